"""Who may take part, and what it cost, against dense matrices."""

import itertools
import math

import pytest
import torch

from corolla.privacy import banded
from corolla.privacy.participation import Participation


def test_without_limits_everybody_may() -> None:
    found = Participation(1, 1, None)
    for t in range(5):
        assert not found.refusal("a", t)
        found.note(t, ["a"], 1.0)
    assert found.mu == pytest.approx(math.sqrt(5))
    assert found.times == 5


def test_most() -> None:
    found = Participation(1, 1, 2)
    found.note(1, ["a", "b"], 1.0)
    found.note(2, ["a"], 1.0)
    assert found.refusal("a", 3) == "has trained in 2 rounds, and participations=2"
    assert not found.refusal("b", 3)
    assert not found.refusal("c", 3)


def test_separation() -> None:
    found = Participation(3, 3, None)
    found.note(4, ["a"], 1.0)
    assert [bool(found.refusal("a", t)) for t in (5, 6, 7, 8)] == [True, True, False, False]
    assert found.refusal("a", 6) == "has trained in round 4, and separation=3"
    assert not found.refusal("a", 4)  # when the round is done again


def test_independent_noise_costs_each_client_its_own_rounds() -> None:
    found = Participation(1, 1, None)
    for t, clients in enumerate((["a", "b"], ["a"], ["c"], ["a", "c"])):
        found.note(t, clients, 2.0)
    assert found.mu == pytest.approx(math.sqrt(3) / 2)
    assert found.next_mu(4, 2.0) == pytest.approx(math.sqrt(4) / 2)
    assert found.mu == pytest.approx(math.sqrt(3) / 2)


def test_a_new_client_is_the_least_that_a_round_costs() -> None:
    found = Participation(1, 1, 1)
    assert found.mu == 0
    assert found.next_mu(1, 2.0) == pytest.approx(0.5)
    found.note(1, ["a"], 2.0)
    assert found.next_mu(2, 2.0) == pytest.approx(0.5)  # "a" may not


@pytest.mark.parametrize("bands", [2, 3])
def test_correlated_noise_costs_what_the_dense_matrix_says(bands: int) -> None:
    """For every pattern of one client that separation allows, after every round."""
    n = 7
    c = torch.tensor(
        [
            [banded.coefficients(bands)[i - j] if 0 <= i - j < bands else 0.0 for j in range(n)]
            for i in range(n)
        ]
    )
    for k in range(1, n):
        for pattern in itertools.combinations(range(n), k):
            if any(b - a < bands for a, b in itertools.pairwise(pattern)):
                continue
            found = Participation(bands, bands, None)
            for t in range(n):
                found.note(t, ["a"] if t in pattern else [], 0.5)
                own = [p for p in pattern if p <= t]
                wanted = float(c[: t + 1, own].sum(dim=1).norm()) / 0.5
                assert found.mu == pytest.approx(wanted, rel=1e-6)


def test_the_next_round_is_counted_with_the_noise_that_it_takes_back() -> None:
    """Also for a client that is not in it."""
    found = Participation(2, 2, None)
    found.note(1, ["a"], 1.0)
    assert found.next_mu(2, 1.0) == pytest.approx(math.sqrt(1 + 1 / 4))
    found.note(2, ["b"], 1.0)
    assert found.mu == pytest.approx(math.sqrt(1 + 1 / 4))


def test_a_round_that_is_done_again_counts_again() -> None:
    """Its row of C is shown twice: the second time with whoever is in it then."""
    found = Participation(2, 2, None)
    found.note(1, ["a"], 1.0)
    found.note(2, ["b"], 1.0)
    found.note(2, ["b", "c"], 1.0)
    squares = {"a": 1 + 2 / 4, "b": 2.0, "c": 1.0}
    assert found.mu == pytest.approx(math.sqrt(max(squares.values())))
    found.note(3, [], 1.0)
    assert found.mu == pytest.approx(math.sqrt(2 + 1 / 4))  # "b": once from the second time
    assert found.times == 2
