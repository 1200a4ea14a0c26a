"""The blocks of a model by number, and which of its modules are in them.

A model is a stack of like blocks; the number of a module's block is the first number in its name,
as peft reads `layers_to_transform`. A backward pass ends at the deepest block that is trained:
those below cost it neither time nor memory (PockEngine, Zhu et al., MICRO 2023, arXiv 2310.17752).
"""

from collections.abc import Collection

from corolla.errors import ModelError


def block(name: str) -> tuple[str, int] | None:
    """Returns the stack and the number of a module's block; None for a module outside of blocks."""
    before, _, after = name.partition(".")
    while after:
        part, _, rest = after.partition(".")
        if part.isdecimal() and rest:
            return before, int(part)
        before, after = f"{before}.{part}", rest
    return None


def numbers(text: str, count: int) -> list[int]:
    """Returns the blocks that are meant by the key `layers`, of a model of so many, in order.

    Raises ModelError for a block that the model does not have.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        end, _, length = part.partition(":")
        first, _, last = part.partition("-")
        if length:
            least, most = 0, int(length) - 1
            if end == "last":
                least, most = count - int(length), count - 1
        else:
            least, most = int(first), int(last or first)
        if not 0 <= least <= most < count:
            raise ModelError(
                f"layers={text}: the model has blocks 0 to {count - 1}; {part} names others"
            )
        chosen.update(range(least, most + 1))
    return sorted(chosen)


def chosen(names: Collection[str], text: str) -> list[int]:
    """Returns the same for a model whose modules have these names.

    Raises ModelError where the modules are in no blocks, or in those of more than one stack.
    """
    found = [place for name in names if (place := block(name))]
    stacks = sorted({stack for stack, _ in found})
    if len(stacks) != 1:
        has = f"stacks {', '.join(stacks)}" if stacks else "no numbered blocks"
        raise ModelError(f"layers={text} needs a model of one stack of blocks, found {has}")
    return numbers(text, 1 + max(number for _, number in found))


def kept(names: Collection[str], text: str | None) -> list[str]:
    """Returns the modules that are in the blocks meant by the key `layers`; None: all modules.

    Raises ModelError as `chosen` does.
    """
    if text is None:
        return list(names)
    wanted = set(chosen(names, text))
    return [name for name in names if (place := block(name)) and place[1] in wanted]
