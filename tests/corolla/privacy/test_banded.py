"""Correlated noise against dense matrices, and sensitivity against all patterns there are."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from corolla.privacy import banded


def dense(n: int, bands: int) -> Tensor:
    """The banded part of C, where C · C is the lower triangular matrix of ones: (n, n)."""
    # √ of a Toeplitz matrix column by column, from c_0 = 1 and Σ_j c_j c_{k-j} = 1.
    c = [1.0]
    for k in range(1, n):
        c.append((1 - sum(c[j] * c[k - j] for j in range(1, k))) / 2)
    rows = [[c[i - j] if 0 <= i - j < bands else 0.0 for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_without_a_limit_its_square_sums_over_rounds(n: int) -> None:
    c = dense(n, n)
    assert torch.allclose(c @ c, torch.ones(n, n, dtype=torch.float64).tril())
    assert banded.coefficients(n) == pytest.approx(c[:, 0].tolist(), rel=1e-12)


@pytest.mark.parametrize(("n", "wanted"), [(10, 1.3384), (100, 1.5910), (1000, 1.8069)])
def test_sensitivity_to_a_client_that_takes_part_once(n: int, wanted: float) -> None:
    assert banded.sensitivity(n, n, 1, n) == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("separation", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_sensitivity_is_the_worst_of_all_patterns(n: int, separation: int, most: int) -> None:
    """Parts of norm 1, in the worst direction each: with C >= 0 that is the same one for all."""
    for bands in range(1, separation + 1):
        c = dense(n, bands)
        worst = 0.0
        for k in range(1, min(n, most) + 1):
            for pattern in itertools.combinations(range(n), k):
                if all(b - a >= separation for a, b in itertools.pairwise(pattern)):
                    worst = max(worst, float(c[:, list(pattern)].sum(dim=1).norm()))
        assert banded.sensitivity(n, bands, most, separation) == pytest.approx(worst, rel=1e-12)


def test_one_band_is_independent_noise() -> None:
    assert banded.sensitivity(30, 1, 9, 1) == pytest.approx(3.0)
    assert banded.correlate({"w": torch.ones(2)}, [], 1)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("bands", [1, 2, 4, 12])
def test_correlated_noise_solves_the_dense_system(bands: int) -> None:
    n, generator = 12, torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, 2, generator=generator, dtype=torch.float64)
    past: list[banded.Noise] = []
    for fresh in z:
        past.insert(0, banded.correlate({"w": fresh}, past[: bands - 1], bands))
    found = torch.stack([own["w"] for own in reversed(past)]).reshape(n, -1)
    wanted = torch.linalg.solve(dense(n, bands), z.reshape(n, -1))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_tensor_that_was_not_released_had_no_noise() -> None:
    """As in rounds that train one factor alone: its own rows of C are those it was in."""
    past = [{"a": torch.full((2,), 4.0)}, {"b": torch.full((2,), 8.0)}]
    found = banded.correlate({"a": torch.zeros(2), "b": torch.zeros(2)}, past, 3)
    assert found["a"].tolist() == [-2, -2]
    assert found["b"].tolist() == [-3, -3]


@pytest.mark.parametrize(("n", "wanted"), [(10, 1.42), (100, 3.00), (1000, 7.21)])
def test_sums_over_rounds_are_less_noisy_at_equal_privacy(n: int, wanted: float) -> None:
    """Root mean square error of all prefix sums, against that of independent noise."""
    independent = math.sqrt((n + 1) / 2)
    inverse = torch.linalg.inv(dense(n, n))
    prefix = torch.ones(n, n, dtype=torch.float64).tril() @ inverse
    error = float(prefix.square().sum(dim=1).mean().sqrt()) * banded.sensitivity(n, n, 1, n)
    assert independent / error == pytest.approx(wanted, abs=6e-3)


@pytest.mark.parametrize("bands", [1, 2, 4, 12])
def test_the_spread_of_a_round_is_that_of_the_dense_inverse(bands: int) -> None:
    inverse = torch.linalg.inv(dense(12, bands))
    wanted = inverse.norm(dim=1).tolist()
    assert [banded.spread(t, bands) for t in range(1, 13)] == pytest.approx(wanted, rel=1e-12)
