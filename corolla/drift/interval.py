"""Means with the 95 % interval of Student's t, over rows (Student, Biometrika 1908)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from scipy.stats import t as student

from corolla.evaluation.scoring import RowLosses, standard_error


@dataclass(frozen=True)
class Change:
    """A mean change and its 95 % interval; of a single row there is none."""

    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """For run.json."""
        return asdict(self)


def sentence(told: Mapping[str, float | None]) -> str:
    """A change of run.json as people read it: mean (low to high)."""
    if told["low"] is None:
        return f"{told['mean']:+.4f}"
    return f"{told['mean']:+.4f} ({told['low']:+.4f} to {told['high']:+.4f})"


def of_rows(changes: Sequence[float]) -> Change:
    """The mean over rows, each counting once."""
    if len(changes) < 2:
        return _around(changes[0], None, 1)
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return _around(statistics.fmean(changes), error, len(changes))


def of_targets(changes: RowLosses) -> Change:
    """Σ change / Σ targets over rows (number → (summed change, targets)): of a loss per target."""
    targets = sum(number for _, number in changes.values())
    centre = math.fsum(change for change, _ in changes.values()) / targets
    return _around(centre, standard_error(changes).get("loss_error"), len(changes))


def _around(centre: float, error: float | None, rows: int) -> Change:
    if error is None:
        return Change(centre, None, None)
    half = float(student.ppf(0.975, rows - 1)) * error
    return Change(centre, centre - half, centre + half)
