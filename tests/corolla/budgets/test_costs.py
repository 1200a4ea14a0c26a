"""Levels of costs: the set chosen from them is the best of all sets, by the counted operations."""

import itertools
from pathlib import Path

import pytest

from corolla.budgets import costs, knapsack
from corolla.estimates.footprint import Batch
from corolla.models import anatomy
from corolla.models.anatomy import Anatomy
from tests.strategies import tiny

BATCH = Batch(2, 12, 24)


@pytest.fixture(scope="module", params=[("gpt2", 2), ("llama", 1)], ids=["gpt2", "llama"])
def sizes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    kind, count = request.param
    folder = tmp_path_factory.mktemp(kind)
    tiny.base(kind, count).model.save_pretrained(folder)
    return anatomy.read(str(folder))


def scored(name: str, rank: int) -> int:
    """A value that knows nothing of costs."""
    return sum(map(ord, name)) % 17 + rank


@pytest.mark.parametrize("share", [0.2, 0.4, 0.55, 0.8, 1.0])
def test_the_set_of_modules_is_the_best_of_all(sizes: Anatomy, share: float) -> None:
    names = list(sizes.linear())
    everything = costs.backward(sizes, BATCH, dict.fromkeys(names, 4))
    budget = int(share * everything)
    levels = costs.of_modules(sizes, BATCH, names, [4], scored)
    fixed = 2 * BATCH.targets * sizes.hidden * sizes.vocabulary
    chosen = knapsack.best(levels, budget, fixed)
    known = {
        some: costs.backward(sizes, BATCH, dict.fromkeys(some, 4))
        for size in range(1, len(names) + 1)
        for some in itertools.combinations(names, size)
    }
    top = max(
        (sum(scored(name, 4) for name in some) for some, cost in known.items() if cost <= budget),
        default=0,
    )
    assert sum(scored(name, 4) for name in chosen) == top
    assert costs.backward(sizes, BATCH, chosen) <= budget


def test_ranks_are_chosen_with_the_modules(sizes: Anatomy) -> None:
    """Three modules of three ranks: all 63 ways."""
    names, ranks = list(sizes.linear())[:3], [1, 2, 4]
    fixed = 2 * BATCH.targets * sizes.hidden * sizes.vocabulary
    levels = costs.of_modules(sizes, BATCH, names, ranks, scored)
    ways = [
        {name: rank for name, rank in zip(names, picked, strict=True) if rank}
        for picked in itertools.product([0, *ranks], repeat=3)
    ]
    taken = [(way, costs.backward(sizes, BATCH, way)) for way in ways if way]
    for budget in sorted(cost for _, cost in taken)[::9]:
        chosen = knapsack.best(levels, budget, fixed)
        within = [sum(scored(*own) for own in way.items()) for way, cost in taken if cost <= budget]
        assert sum(scored(*own) for own in chosen.items()) == max(within)
        assert costs.backward(sizes, BATCH, chosen) <= budget


def test_whole_blocks_are_chosen_by_their_operations(tmp_path: Path) -> None:
    tiny.base("llama", 3).model.save_pretrained(tmp_path)
    sizes = anatomy.read(str(tmp_path))
    names = list(sizes.linear())
    members = costs.by_block(names)
    fixed = 2 * BATCH.targets * sizes.hidden * sizes.vocabulary
    values = {"0": 7, "1": 2, "2": 3}
    levels = costs.of_blocks(sizes, BATCH, names, 4, lambda name, rank: values[name])
    known = {
        some: costs.backward(sizes, BATCH, {n: 4 for b in some for n in members[b]})
        for size in (1, 2, 3)
        for some in itertools.combinations(range(3), size)
    }
    for budget in known.values():
        chosen = knapsack.best(levels, budget, fixed)
        within = [sum(values[str(b)] for b in s) for s, cost in known.items() if cost <= budget]
        assert sum(values[name] for name in chosen) == max(within)
        assert known[tuple(sorted(map(int, chosen)))] <= budget
