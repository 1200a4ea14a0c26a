"""Student's t for means over a few seeds: intervals, paired tests, Holm's correction.

Student, "The Probable Error of a Mean", Biometrika 1908; the closed form for whole degrees of
freedom is 26.7.3 and 26.7.4 of Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % confidence interval; None for a single value, which has none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def apart_from(self, other: "Mean") -> bool:
        """Whether both have intervals and these do not overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.high < other.low or other.high < self.low


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % Student-t interval of one or more independent values."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Mean(centre, None, None, len(values))
    half = quantile(0.95, len(values) - 1) * _error(values)
    return Mean(centre, centre - half, centre + half, len(values))


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test: how likely a mean this far from 0 is by chance."""
    centre, error = statistics.fmean(differences), _error(differences)
    if error == 0:
        return float(centre == 0)
    return 1 - within(centre / error, len(differences) - 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979)."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return adjusted


def within(t: float, df: int) -> float:
    """P(|T| <= |t|) for T with `df` = 1, 2, ... degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + (sine * total if df > 1 else 0.0))
    return sine * total


def quantile(probability: float, df: int) -> float:
    """The t with P(|T| <= t) = `probability`, by bisection: 4.303 for 0.95 and 2."""
    low, high = 0.0, 1.0
    while within(high, df) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, df) < probability else (low, middle)
    return high


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
