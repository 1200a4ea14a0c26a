"""The best set of modules under a budget, where the deepest of them decides what lies above it.

A backward pass goes from the loss to the deepest module of the set, through all that lies between.
So the levels of a model are walked from the loss downwards: with each as the deepest, what remains
of the budget is a knapsack over the modules above it, and one table serves all of these. Smaller
sets with the same deepest level only pay too much, so the best over all levels is the best set. It
is the choice of GreenTrainer (Huang et al., ICLR 2024, arXiv 2309.13192) and, with several ranks of
a module, that of FedPipe (Fang et al., 2024, arXiv 2404.06448).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 20_000
"""The number of parts of a budget that costs are rounded up to, where no common divisor of them
makes fewer."""


@dataclass(frozen=True)
class Option:
    """One way to take an item: `rank` tells which; value and cost are whole numbers."""

    rank: int
    value: int
    cost: int


@dataclass(frozen=True)
class End:
    """The choice in the deepest level: ranks by name, their value and cost together."""

    ranks: Mapping[str, int]
    value: int
    cost: int


@dataclass(frozen=True)
class Level:
    """Items that read the same tensor; levels are in the order from the loss downwards."""

    items: Mapping[str, Sequence[Option]]
    """Name → the ways to take it where something below is taken as well."""
    ends: Sequence[End]
    """The ways to take some of them where nothing below is taken."""
    through: int = 0
    """The cost of the way through the level to what is taken below."""


def plain(items: Mapping[str, Sequence[Option]]) -> list[Level]:
    """Levels of items whose costs only add up; the first one is preferred among equals."""
    return [
        Level({name: ways}, [End({name: way.rank}, way.value, way.cost) for way in ways])
        for name, ways in items.items()
    ]


def best(levels: Sequence[Level], budget: int, fixed: int = 0) -> dict[str, int]:
    """Returns the ranks by name of the set of most value whose cost is at most `budget`.

    `fixed` is a cost of any set. {} where no set fits. Costs are rounded up to parts of the budget
    that are so small that there are _STEPS of them; with a common divisor that is large enough, not
    at all. Among sets of one value that of the earlier levels is taken.
    """
    left = budget - fixed
    unit = _unit(levels, left)
    if left < 0:
        return {}
    steps = left // unit
    table = np.zeros(steps + 1, np.int64)
    taken: list[tuple[str, Sequence[Option], np.ndarray]] = []
    found: tuple[int, int, int, End] | None = None  # value, items above, what is left, the end
    through = 0
    for level in levels:
        for end in level.ends:
            spare = steps - math.ceil((through + end.cost) / unit)
            if spare >= 0 and (found is None or end.value + table[spare] > found[0]):
                found = (end.value + int(table[spare]), len(taken), spare, end)
        for name, ways in level.items.items():
            table, choice = _extended(table, ways, unit)
            taken.append((name, ways, choice))
        through += level.through
    if found is None:
        return {}
    _, above, spare, end = found
    return {**_traced(taken[:above], spare, unit), **end.ranks}


def least(levels: Sequence[Level]) -> int:
    """The cost of the set that costs least. Raises ValueError where there is nothing to take."""
    through, found = 0, []
    for level in levels:
        found += [through + end.cost for end in level.ends]
        through += level.through
    return min(found)


def whole(scores: Mapping[str, float]) -> dict[str, int]:
    """Scores as whole numbers from 1 to 1 + 2^20, so that sums of them are exact.

    A module whose step has not helped keeps 1: it is taken where nothing better fits.
    """
    top = max(scores.values(), default=0.0)
    if top <= 0:
        return dict.fromkeys(scores, 1)
    return {name: 1 + round(max(0.0, own) / top * (1 << 20)) for name, own in scores.items()}


def _unit(levels: Sequence[Level], budget: int) -> int:
    """The cost that is one part of the budget."""
    costs = [level.through for level in levels]
    costs += [way.cost for level in levels for ways in level.items.values() for way in ways]
    costs += [end.cost for level in levels for end in level.ends]
    exact = max(1, math.gcd(*costs))
    return exact if budget // exact <= _STEPS else math.ceil(budget / _STEPS)


def _extended(
    table: np.ndarray, ways: Sequence[Option], unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The table with one more item, and which way of it is taken at each budget; 0: none."""
    after, choice = table.copy(), np.zeros(len(table), np.int8)
    for number, way in enumerate(ways, 1):
        cost = math.ceil(way.cost / unit)
        if cost >= len(table):
            continue
        gained = table[: len(table) - cost] + way.value
        better = gained > after[cost:]
        after[cost:][better] = gained[better]
        choice[cost:][better] = number
    return after, choice


def _traced(
    taken: Sequence[tuple[str, Sequence[Option], np.ndarray]], spare: int, unit: int
) -> dict[str, int]:
    """The items that make up the value of a table at a budget."""
    ranks: dict[str, int] = {}
    for name, ways, choice in reversed(taken):
        if number := int(choice[spare]):
            way = ways[number - 1]
            ranks[name] = way.rank
            spare -= math.ceil(way.cost / unit)
    return ranks
