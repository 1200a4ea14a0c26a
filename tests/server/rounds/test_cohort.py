import hashlib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import DataError
from corolla.server.rounds.cohort import read_trace, sample

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


# Weights


def test_weighted_cohorts_are_drawn_one_after_the_other_by_weight() -> None:
    """Chi-square over the six pairs of four clients; 20.5 is its 99.9 % point.

    The oracle: the first with probability w_i / W, the second with w_j / (W - w_i).
    """
    weights, rounds = {"a": 1, "b": 2, "c": 3, "d": 10}, 5000
    total = sum(weights.values())
    wanted = {
        (i, j): weights[i] * weights[j] / total * sum(1 / (total - weights[k]) for k in (i, j))
        for i, j in combinations("abcd", 2)
    }
    assert sum(wanted.values()) == pytest.approx(1)
    found = Counter(tuple(sample("abcd", 2, 3, round, weights)) for round in range(rounds))
    assert found.keys() <= wanted.keys()
    off = ((found[pair] - rounds * p) ** 2 / (rounds * p) for pair, p in wanted.items())
    assert sum(off) < 20.5


@given(st.permutations(NAMES), st.integers(1, 20), st.integers(0, 2**40))
def test_the_order_of_names_decides_nothing_with_weights(
    clients: list[str], size: int, seed: int
) -> None:
    weights = {name: 1 + i for i, name in enumerate(NAMES)}
    drawn = sample(clients, size, seed, 3, weights)
    assert drawn == sample(NAMES, size, seed, 3, weights) == sorted(set(drawn))
    assert len(drawn) == size


def test_draws_of_one_round_differ_and_the_first_is_that_of_the_round() -> None:
    assert sample(NAMES, 5, 0, 1, draw=0) == sample(NAMES, 5, 0, 1)
    assert len({tuple(sample(NAMES, 5, 0, 1, draw=draw)) for draw in range(50)}) > 45


# Availability


def test_a_trace_says_who_can_be_reached(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [("ada", 1, 2), ("ben", 2, 3), ("ada", 4, 4), ("stranger", 1, 9)]
    lines = [json.dumps({"client_id": c, "from": a, "to": b}) for c, a, b in rows]
    file.write_text("\n\n".join(lines))
    trace = read_trace(file)
    found = [trace.present(["ben", "ada", "cyd"], round) for round in range(1, 6)]
    assert found == [["ada"], ["ben", "ada"], ["ben"], ["ada"], []]
    assert trace.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


GOOD = '{"client_id": "a", "from": 1, "to": 2}\n'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["line 2", "not JSON"]),
        ("\xff", ["line 2", "not JSON"]),
        ("[1, 2]", ["line 2", "expected", "[1, 2]"]),
        ('{"client_id": "a", "from": 1}', ["line 2", "expected", "'from': 1"]),
        ('{"client_id": "a", "from": 1, "to": 2, "until": 3}', ["line 2", "'until': 3"]),
        ('{"client_id": 7, "from": 1, "to": 2}', ["line 2", "'client_id': 7"]),
        ('{"client_id": "a", "from": 0, "to": 2}', ["line 2", "found 0 and 2"]),
        ('{"client_id": "a", "from": 3, "to": 2}', ["line 2", "found 3 and 2"]),
        ('{"client_id": "a", "from": true, "to": 2}', ["line 2", "found True and 2"]),
        ('{"client_id": "a", "from": 1, "to": 2.5}', ["line 2", "found 1 and 2.5"]),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes((GOOD + line).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_trace(file)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_trace_that_says_nothing_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "trace.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"trace\.jsonl"):
        read_trace(file)
