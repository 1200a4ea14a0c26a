from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.server.cohort import sample

NAMES = [f"c{i:02d}" for i in range(20)]


@given(st.permutations(NAMES), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 10**5))
def test_a_cohort_is_sorted_and_without_repetition(
    clients: list[str], size: int, seed: int, round: int
) -> None:
    drawn = sample(clients, size, seed, round)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == size
    assert set(drawn) <= set(NAMES)
    assert drawn == sample(NAMES, size, seed, round)  # the order of names decides nothing


def test_cohorts_change_with_round_and_seed() -> None:
    assert len({tuple(sample(NAMES, 5, 0, round)) for round in range(50)}) > 45
    assert len({tuple(sample(NAMES, 5, seed, 1)) for seed in range(50)}) > 45


def test_every_cohort_is_equally_likely() -> None:
    """Chi-square over the ten pairs of five clients in 5,000 rounds; 27.9 is its 99.9 % point."""
    found = Counter(tuple(sample("abcde", 2, 7, round)) for round in range(5000))
    assert found.keys() == set(combinations("abcde", 2))
    assert sum((n - 500) ** 2 / 500 for n in found.values()) < 27.9


@pytest.mark.parametrize("size", [20, 25])
def test_everybody_takes_part_when_there_are_no_more(size: int) -> None:
    assert sample(NAMES, size, 0, 1) == NAMES


def test_global_randomness_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = sample(NAMES, 5, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert sample(NAMES, 5, 0, 1) == first
