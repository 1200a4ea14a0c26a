"""The costs of training modules or whole blocks, as levels of the knapsack."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from corolla.budgets.knapsack import End, Level, Option
from corolla.estimates import flops
from corolla.estimates.footprint import Batch
from corolla.models.anatomy import Anatomy
from corolla.tensors import units

Value = Callable[[str, int], int]
"""The value of a module, or of a block by name, at a rank."""

_ASK = 3
"""The level of queries, keys and values in a block, the deepest."""


def of_modules(
    model: Anatomy, batch: Batch, names: Sequence[str], ranks: Sequence[int], value: Value
) -> list[Level]:
    """Levels of the operations backwards, where any of the modules `names` may be trained.

    Raises ModelError for a model whose operations are not counted, see flops.blocks.
    """
    wanted, found = set(names), []
    for block in flops.blocks(model):
        for depth, shapes in enumerate(block.levels):
            products = flops.attention(model, batch) if depth == _ASK else 0
            own = {name: shape for name, shape in shapes.items() if name in wanted}
            ways = {
                name: [_above(batch, shape, rank, value(name, rank)) for rank in ranks]
                for name, shape in own.items()
            }
            ends = [
                End(
                    dict(zip(some, picked, strict=True)),
                    sum(value(name, rank) for name, rank in zip(some, picked, strict=True)),
                    sum(
                        flops.own_backward(batch, own[name], rank)
                        for name, rank in zip(some, picked, strict=True)
                    )
                    + (flops.attention_backward(flops.parts(some)) * products if products else 0),
                )
                for some in _subsets(list(own))
                for picked in itertools.product(ranks, repeat=len(some))
            ]
            through = sum(flops.input_backward(batch, shape, 0) for shape in shapes.values())
            found.append(Level(ways, ends, through + 4 * products))
    return found


def of_blocks(
    model: Anatomy, batch: Batch, names: Sequence[str], rank: int, value: Value
) -> list[Level]:
    """The same where each block is trained whole: items are numbers of blocks, as text."""
    found = []
    members = by_block(names)
    for block in flops.blocks(model):
        own = members.get(block.number, [])
        work = flops.by_block(flops.count(model, batch, dict.fromkeys(own, rank)))
        shapes = {name: shape for level in block.levels for name, shape in level.items()}
        through = sum(flops.input_backward(batch, shape, 0) for shape in shapes.values())
        through += 4 * flops.attention(model, batch)
        item = str(block.number)
        above = sum(_above(batch, shapes[name], rank, 0).cost for name in own)
        gained = value(item, rank)
        ways = {item: [Option(rank, gained, above)]} if own else {}
        ends = [End({item: rank}, gained, work[block.number].backward)] if own else []
        found.append(Level(ways, ends, through))
    return found


def backward(model: Anatomy, batch: Batch, ranks: Mapping[str, int], labels: int = 0) -> int:
    """The operations of a backward pass in all."""
    return flops.total(flops.count(model, batch, ranks, labels)).backward


def by_block(names: Sequence[str]) -> dict[int, list[str]]:
    """The names of modules by the number of their block, the last block first."""
    found: dict[int, list[str]] = {}
    for name in names:
        if place := units.block(name):
            found.setdefault(place[1], []).append(name)
    return dict(sorted(found.items(), reverse=True))


def _above(batch: Batch, shape: tuple[int, int], rank: int, value: int) -> Option:
    """A module where something below is trained: its input's gradient goes through A as well."""
    cost = flops.own_backward(batch, shape, rank)
    cost += flops.input_backward(batch, shape, rank) - flops.input_backward(batch, shape, 0)
    return Option(rank, value, cost)


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(1, len(names) + 1)
    )
