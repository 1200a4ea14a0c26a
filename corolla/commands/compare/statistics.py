"""Student's t for means over a few seeds: intervals, paired tests, Holm's correction.

Student, "The Probable Error of a Mean", Biometrika 1908.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % confidence interval; None for a single value, which has none."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % Student-t interval of one or more independent values."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Mean(centre, None, None, len(values))
    half = float(_student().ppf(0.975, len(values) - 1)) * _error(values)
    return Mean(centre, centre - half, centre + half, len(values))


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test: how likely a mean this far from 0 is by chance."""
    centre, error = statistics.fmean(differences), _error(differences)
    if error == 0:
        return float(centre == 0)
    return float(2 * _student().sf(abs(centre / error), len(differences) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979)."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return adjusted


def _student() -> Any:
    """Student's t of scipy, which takes a second to import: once all runs are done."""
    from scipy.stats import t

    return t


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
