"""Correlated noise: what is added in one round is partly taken back in the next ones.

The banded square root of Kalinin and Lampert, "Banded Square Root Matrix Factorization for
Differentially Private Model Training", NeurIPS 2024, arXiv 2405.13763: sums over rounds are the
lower triangular matrix of ones, which is C · C for the Toeplitz matrix C of the coefficients
c_j = (2j choose j) / 4^j. Of C only the first `bands` diagonals are kept. Rounds release x + C⁻¹ z
with independent z, which is as private as C x + z: one Gaussian mechanism whose sensitivity is that
of C (theorem 1 of Denisov et al., NeurIPS 2022, arXiv 2202.08312, also for x that follow what was
released before).
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

Noise = Mapping[str, Tensor]
"""Tensor name → noise in units of its standard deviation, fp64."""


def coefficients(bands: int) -> list[float]:
    """c_0 = 1, c_1 = 1/2, c_2 = 3/8, …: the first column of C, its first `bands` values."""
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return found


def sensitivity(rounds: int, bands: int, participations: int, separation: int) -> float:
    """How far C x can move with one client whose every part in x has norm 1, in `rounds` rounds.

    It takes part at most so often, and again only `separation` >= `bands` rounds later, so that its
    columns of C do not overlap and their squares add up: those of the first rounds are longest
    (Kalinin and Lampert, theorem 2). With one band it is √participations.
    """
    c = coefficients(bands)
    starts = range(0, rounds, separation)[:participations]
    return math.sqrt(math.fsum(v * v for start in starts for v in c[: rounds - start]))


def spread(round: int, bands: int) -> float:
    """The standard deviation of a value of C⁻¹ z in a round, from 1 on; 1 with one band."""
    c, row = coefficients(bands), [1.0]
    for t in range(1, round):
        row.append(-sum(c[j] * row[t - j] for j in range(1, min(bands, t + 1))))
    return math.sqrt(math.fsum(v * v for v in row))


def correlate(fresh: Noise, past: Sequence[Noise], bands: int) -> Noise:
    """The next row of C⁻¹ z: w_t = z_t - Σ_{0<j<bands} c_j w_{t-j}, with w_{t-1} first in `past`.

    A tensor that an earlier round did not release had no noise there.
    """
    lags = list(zip(coefficients(bands)[1:], past, strict=False))
    return {
        name: z - sum(c * own[name] for c, own in lags if name in own) if lags else z
        for name, z in fresh.items()
    }
