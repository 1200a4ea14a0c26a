"""Floating-point operations of training LoRA factors, exact, by module, from the sizes of a model.

A product of matrices (a, b) and (b, c) takes 2 a b c; all else is left out, as by PyTorch's counter
(torch.utils.flop_counter). A backward pass takes only the products whose result is needed: those of
what lies between the loss and the deepest trained module, whose own input needs no gradient
(PockEngine, Zhu et al., MICRO 2023, arXiv 2310.17752; GreenTrainer, Huang et al., ICLR 2024, arXiv
2309.13192).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from corolla.errors import ModelError
from corolla.estimates.footprint import Batch
from corolla.models.anatomy import Anatomy
from corolla.tensors import units

HEAD = "head"
"""The name of the output layer in a count."""
ATTENTION = "attention"
"""The last name of the two products of a block's attention in a count."""

_DOWN, _WIDEN, _MIX, _ASK = range(4)
"""The levels of a block from the loss downwards: modules of one level read the same tensor."""

_LEVELS = (
    (_DOWN, r"down_proj|mlp\.c_proj|fc2|lin2|dense_4h_to_h|(?<!attention\.)output\.dense"),
    (_WIDEN, r"gate_proj|up_proj|gate_up_proj|c_fc|fc1|lin1|dense_h_to_4h|intermediate\.dense"),
    (_MIX, r"o_proj|attn\.c_proj|out_proj|out_lin|attention\.output\.dense"),
    (_ASK, r"[qkv]_proj|query|key|value|[qkv]_lin|qkv_proj|c_attn"),
)
_MEANT = [(level, re.compile(rf"(?:.*\.)?(?:{names})")) for level, names in _LEVELS]
_ASKS = re.compile(r"([qkv])_(?:proj|lin)|(query)|(key)|(value)")

_UNLIKE = {"phi", "gptj", "gpt_neox", "falcon", "cohere", "cohere2", "codegen", "stablelm"}
"""Families whose attention and MLP read the same input, or that may be so."""


@dataclass(frozen=True)
class Flops:
    """Operations of a module, a block or a model."""

    forward: int
    backward: int

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Block:
    """The linear layers of a block."""

    number: int
    prefix: str
    levels: Sequence[Mapping[str, tuple[int, int]]]
    """Level → name of a module → (out, in), from the loss downwards."""


def count(
    model: Anatomy, batch: Batch, ranks: Mapping[str, int], labels: int = 0
) -> dict[str, Flops]:
    """The operations of a step by module, of a model with adapters of these ranks.

    `ranks` are of the trained modules by name, `labels` those of a classifier, whose head is
    trained as well. The output layer is HEAD, the products of queries and keys and with values are
    `<block>.attention`. Raises ModelError for a model whose structure is not known here: see
    `blocks`.
    """
    found = blocks(model)
    known = {name for block in found for level in block.levels for name in level}
    if unknown := sorted(ranks.keys() - known):
        raise ModelError(f"{model.name} has no linear layer {unknown[0]} in a block")
    work: dict[str, Flops] = {}
    reached = False  # whether the input of a block needs a gradient
    for block in reversed(found):
        own = _Pass(model, batch, ranks, reached)
        work |= own.of(block)
        reached = own.reached
    return {**work, HEAD: head(model, batch, reached, labels)}


def head(model: Anatomy, batch: Batch, reached: bool, labels: int = 0) -> Flops:
    """The operations of the output layer; of a classifier it is trained, at all positions."""
    rows, classes = (batch.positions, labels) if labels else (batch.targets, model.vocabulary)
    product = 2 * rows * classes * model.hidden
    return Flops(product, product * (bool(labels) + reached))


def total(work: Mapping[str, Flops]) -> Flops:
    """The sum over all modules."""
    return sum(work.values(), Flops(0, 0))


def by_block(work: Mapping[str, Flops]) -> dict[int | None, Flops]:
    """The sums over blocks, by number; None: outside of blocks."""
    found: dict[int | None, Flops] = {}
    for name, own in work.items():
        place = units.block(name)
        number = place[1] if place else None
        found[number] = found.get(number, Flops(0, 0)) + own
    return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0])))


def blocks(model: Anatomy) -> list[Block]:
    """The blocks of a model from the loss downwards, with their linear layers by level.

    Raises ModelError where that is not known: experts, layers outside of blocks, attention and MLP
    side by side, names of other families.
    """
    if model.family in _UNLIKE or model.stacks():
        raise ModelError(f"the operations of models of family {model.family} are not counted here")
    stacks: dict[int, list[dict[str, tuple[int, int]]]] = {}
    prefixes: dict[int, str] = {}
    for name, shape in model.linear().items():
        place = units.block(name)
        level = _level(name)
        if place is None or level is None or "expert" in name:
            raise ModelError(
                f"the operations of {model.name} are not counted here: {name} is no linear layer "
                f"of attention or of an MLP in a block"
            )
        prefixes[place[1]] = f"{place[0]}.{place[1]}"
        stacks.setdefault(place[1], [{}, {}, {}, {}])[level][name] = shape
    found = [Block(n, prefixes[n], stacks[n]) for n in sorted(stacks, reverse=True)]
    for block in found:
        if not all(block.levels):
            raise ModelError(
                f"the operations of {model.name} are not counted here: {block.prefix} has not all "
                f"of attention and an MLP"
            )
    return found


def forward(batch: Batch, shape: tuple[int, int], rank: int) -> int:
    """The operations of a linear layer (out, in) forwards, of its adapter alone where rank > 0."""
    out, into = shape
    return 2 * batch.positions * (rank * (into + out) if rank else into * out)


def own_backward(batch: Batch, shape: tuple[int, int], rank: int) -> int:
    """The operations of the gradients of both factors: of B, of what B reads, and of A."""
    out, into = shape
    return 2 * batch.positions * rank * (into + 2 * out)


def input_backward(batch: Batch, shape: tuple[int, int], rank: int) -> int:
    """The operations of the gradient of a layer's input: through the weight, and through A."""
    out, into = shape
    return 2 * batch.positions * (into * out + rank * into)


def attention(model: Anatomy, batch: Batch) -> int:
    """The operations of one of the two products of attention; all pairs of positions count."""
    return 2 * batch.sequences * model.heads * batch.tokens**2 * model.head_dim


def attention_backward(needed: frozenset[str]) -> int:
    """The number of products backwards, where these of "q", "k" and "v" need a gradient.

    That of the values takes one; the way back to the scores takes one, and each of queries and
    keys another.
    """
    scores = needed & {"q", "k"}
    return len(needed) + bool(scores)


def parts(names: Sequence[str]) -> frozenset[str]:
    """The letters of "q", "k" and "v" that are made by these modules of a block."""
    found: set[str] = set()
    for name in names:
        match = _ASKS.fullmatch(name.rpartition(".")[2])
        found |= set(next(filter(None, match.groups()))[0] if match else "qkv")
    return frozenset(found)


def _level(name: str) -> int | None:
    # The part of the name that is within the block: attention.output.dense, not output.dense.
    return next((level for level, pattern in reversed(_MEANT) if pattern.fullmatch(name)), None)


class _Pass:
    """The passes through a block, whose input needs a gradient where `reached`."""

    def __init__(
        self, model: Anatomy, batch: Batch, ranks: Mapping[str, int], reached: bool
    ) -> None:
        self.model, self.batch, self.ranks, self.reached = model, batch, ranks, reached

    def of(self, block: Block) -> dict[str, Flops]:
        """The operations of its modules and of its attention; then `reached` is of its output."""
        down, widen, mix, ask = block.levels
        below = self.reached
        work = dict(self._linear(ask, below))
        letters = parts([name for name in ask if below or self.ranks.get(name)])
        product = attention(self.model, self.batch)
        work[f"{block.prefix}.{ATTENTION}"] = Flops(
            2 * product, attention_backward(letters) * product
        )
        work |= self._linear(mix, bool(letters))
        self.reached = below or bool(letters) or self._trained(mix)
        work |= self._linear(widen, self.reached)
        widened = self.reached or self._trained(widen)
        work |= self._linear(down, widened)
        self.reached = widened or self._trained(down)
        return work

    def _trained(self, level: Mapping[str, tuple[int, int]]) -> bool:
        return any(self.ranks.get(name) for name in level)

    def _linear(
        self, level: Mapping[str, tuple[int, int]], reached: bool
    ) -> Iterator[tuple[str, Flops]]:
        batch = self.batch
        for name, shape in level.items():
            rank = self.ranks.get(name, 0)
            before = forward(batch, shape, 0) + (forward(batch, shape, rank) if rank else 0)
            back = own_backward(batch, shape, rank)
            back += input_backward(batch, shape, rank) if reached else 0
            yield name, Flops(before, back)
