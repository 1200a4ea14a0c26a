"""The blocks of a model by number, and which of its modules are in them.

A model is a stack of like blocks; the number of a module's block is the first number in its name,
as peft reads `layers_to_transform`. A backward pass ends at the deepest block that is trained:
those below cost it neither time nor memory (PockEngine, Zhu et al., MICRO 2023, arXiv 2310.17752).
"""

from collections.abc import Collection, Sequence

from corolla.errors import ModelError
from corolla.tensors import factors
from corolla.tensors.units import block
from corolla.types import Payload


def numbers(text: str, there: Sequence[int]) -> list[int]:
    """Returns the blocks that are meant by the key `layers`, of those there are, in order.

    Raises ModelError for a block that is not there.
    """
    found: set[int] = set()
    for part in text.split(","):
        end, _, length = part.partition(":")
        first, _, last = part.partition("-")
        if length:
            wanted = set(there[: int(length)] if end == "first" else there[-int(length) :])
            missing = len(wanted) < int(length)
        else:
            wanted = set(range(int(first), int(last or first) + 1))
            missing = not wanted or not wanted <= set(there)
        if missing:
            of = f"{there[0]} to {there[-1]}" if len(there) > 1 else f"{there[0]} alone"
            raise ModelError(
                f"layers={text}: {part} asks for blocks that are not there, found {of}"
            )
        found |= wanted
    return sorted(found)


def text(blocks: Collection[int]) -> str:
    """Numbers of blocks as the key `layers` has them: 0,3,17-23."""
    runs: list[list[int]] = []
    for number in sorted(blocks):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def chosen(names: Collection[str], text: str) -> list[int]:
    """Returns the same for a model whose modules have these names.

    Raises ModelError where the modules are in no blocks, or in those of more than one stack.
    """
    found = [place for name in names if (place := block(name))]
    stacks = sorted({stack for stack, _ in found})
    if len(stacks) != 1:
        has = f"stacks {', '.join(stacks)}" if stacks else "no numbered blocks"
        raise ModelError(f"layers={text} needs a model of one stack of blocks, found {has}")
    return numbers(text, sorted({number for _, number in found}))


def kept(names: Collection[str], text: str | None) -> list[str]:
    """Returns the modules that are in the blocks meant by the key `layers`; None: all modules.

    Raises ModelError as `chosen` does.
    """
    if text is None:
        return list(names)
    wanted = set(chosen(names, text))
    return [name for name in names if (place := block(name)) and place[1] in wanted]


def trained(names: Collection[str], text: str | None) -> frozenset[str]:
    """Returns the tensors of an adapter that are in the blocks meant, and those of a head.

    `first:` and `last:` count among the blocks that the adapter has; factors of modules outside of
    all blocks are in none. Raises ModelError as `chosen` does.
    """
    if text is None:
        return frozenset(names)
    within = [name for name in names if block(name)]
    heads = {name for name in names if factors.is_head(name) and not block(name)}
    return frozenset(heads.union(kept(within, text) if within else ()))


def sent(payload: Payload, text: str | None) -> Payload:
    """Returns the tensors of an update that may have changed where these blocks are trained."""
    if text is None:
        return payload
    kept_of = {group: trained(params, text) for group, params in payload.items()}
    return {
        group: {name: tensor for name, tensor in params.items() if name in kept_of[group]}
        for group, params in payload.items()
    }
