"""The best set under a budget: by hand, and against all sets there are."""

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from corolla.budgets import knapsack
from corolla.budgets.knapsack import End, Level, Option


def single(value: int, own: int, through: int, name: str, ends: int | None = None) -> Level:
    """A level of one module that costs `own` above others and `ends` as the deepest."""
    last = own if ends is None else ends
    return Level({name: [Option(1, value, own)]}, [End({name: 1}, value, last)], through)


def all_sets(levels: Sequence[Level]) -> dict[tuple[tuple[str, int], ...], tuple[int, int]]:
    """Every set → (value, cost): the deepest level pays as an end, those above as items."""
    found = {}
    for depth, level in enumerate(levels):
        above = [[(name, w) for w in ways] + [None] for up in levels[:depth]
                 for name, ways in up.items.items()]  # fmt: skip
        base = sum(up.through for up in levels[:depth])
        for end in level.ends:
            for picked in itertools.product(*above):
                taken = [own for own in picked if own]
                key = tuple(sorted([(n, w.rank) for n, w in taken] + list(end.ranks.items())))
                value = end.value + sum(way.value for _, way in taken)
                found[key] = (value, base + end.cost + sum(way.cost for _, way in taken))
    return found


def check(levels: Sequence[Level], budget: int, fixed: int = 0) -> None:
    known = all_sets(levels)
    chosen = knapsack.best(levels, budget, fixed)
    within = [value for value, cost in known.values() if cost + fixed <= budget]
    if not within:
        assert chosen == {}
        return
    value, cost = known[tuple(sorted(chosen.items()))]
    assert cost + fixed <= budget
    assert value == max(within)


def test_three_modules_by_hand() -> None:
    """Values 5, 4, 3 for 3, 2, 2 under 4: the last two."""
    items = {"a": [Option(1, 5, 3)], "b": [Option(1, 4, 2)], "c": [Option(1, 3, 2)]}
    assert knapsack.best(knapsack.plain(items), 4) == {"b": 1, "c": 1}


def test_a_chain_by_hand_where_the_deepest_pays_its_own_way() -> None:
    """From the loss: dX 0, 2, 1, 4, 0, dW 5, 1, 7, 3, 1. The set {2, 3} takes 3 + 8 of 14."""
    through, own, value = (0, 2, 1, 4, 0), (5, 1, 7, 3, 1), (1, 3, 10, 5, 3)
    levels = [
        single(value[k], own[k], through[k], str(k + 1), own[k] + through[k]) for k in range(5)
    ]
    assert knapsack.best(levels, 14) == {"2": 1, "3": 1}


@pytest.mark.parametrize("seed", range(60))
def test_no_set_is_better(seed: int) -> None:
    """Levels of one to three modules of up to three ranks; ends have costs of their own."""
    draw = random.Random(seed)
    levels, number = [], 0
    for _ in range(draw.randint(1, 4)):
        names = [str(number + i) for i in range(draw.randint(1, 2))]
        number += len(names)
        ranks = range(1, draw.randint(1, 3) + 1)
        ways = {
            name: [Option(r, draw.randint(1, 9) * r, draw.randint(0, 4) * r) for r in ranks]
            for name in names
        }
        ends = [
            End({name: way.rank}, way.value, draw.randint(0, 5))
            for name, own in ways.items()
            for way in own
        ]
        levels.append(Level(ways, ends, draw.randint(0, 5)))
    for budget in (0, 3, 7, 12, 1000):
        check(levels, budget, fixed=draw.randint(0, 2))


def test_everything_of_the_largest_rank_without_a_limit_and_nothing_without_a_budget() -> None:
    items: Mapping[str, Sequence[Option]] = {
        name: [Option(rank, rank, 3 * rank) for rank in (2, 4, 8)] for name in "abc"
    }
    levels = knapsack.plain(items)
    assert knapsack.best(levels, 10**9) == dict.fromkeys("abc", 8)
    assert knapsack.best(levels, 5) == {}
    assert knapsack.best(levels, -1) == {}


def test_costs_are_rounded_up_so_that_no_budget_is_exceeded() -> None:
    """Costs without a common divisor, far more of them than parts of the budget."""
    draw = random.Random(1)
    items = {
        str(i): [Option(1, draw.randint(1, 99), draw.randint(10**9, 10**10))] for i in range(9)
    }
    budget = 2 * 10**10 + 7
    chosen = knapsack.best(knapsack.plain(items), budget)
    assert sum(items[name][0].cost for name in chosen) <= budget
    values = [
        sum(items[n][0].value for n in some)
        for size in range(10)
        for some in itertools.combinations(items, size)
        if sum(items[n][0].cost for n in some) <= budget
    ]
    assert sum(items[name][0].value for name in chosen) == max(values)


def test_among_equals_the_first_levels_are_taken() -> None:
    levels = [single(1, 2, 1, name) for name in "abcd"]
    assert knapsack.best(levels, 5) == {"a": 1, "b": 1}
