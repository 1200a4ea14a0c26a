"""Ranges of the numbers that a server chooses for its clients.

A client refuses a task with a number outside of them before it looks at its rows, or charges its
privacy ledger. `client/native/training/settings.cc` has the same table; tests/received_numbers.json
holds the cases that both are tried on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.errors import WireError

if TYPE_CHECKING:  # what reads settings has no use for torch
    from torch import Tensor

    from corolla.types import Params, Payload


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both ends included."""

    least: float
    most: float

    @property
    def whole(self) -> bool:
        """True for a range of whole numbers alone."""
        return isinstance(self.least, int)

    def holds(self, value: object) -> bool:
        """Returns whether a value is a number of this kind, within the range; NaN is in none."""
        kinds = int if self.whole else (int, float)
        known = isinstance(value, kinds) and not isinstance(value, bool)
        return known and self.least <= value <= self.most  # type: ignore[operator]

    def __str__(self) -> str:
        kind, form = ("whole number", "d") if self.whole else ("number", "g")
        return f"{kind} from {self.least:{form}} to {self.most:{form}}"


RANGES: Mapping[str, Range] = {
    "lr": Range(1e-30, 1e6),
    "eps": Range(1e-20, 1e3),
    "alpha": Range(1e-6, 1e6),
    "weight_decay": Range(0.0, 1e6),
    "warmup_rounds": Range(0.0, 1e5),
    "clip_norm": Range(1e-10, 1e10),
    "clip": Range(1e-10, 1e10),
    "noise_multiplier": Range(1e-3, 1e6),
    "epsilon": Range(1e-6, 1e6),
    "rank": Range(1, 65_536),
    "rounds": Range(1, 100_000),
    "local_steps": Range(1, 100_000),
    "local_epochs": Range(1, 100_000),
    "batch_size": Range(1, 65_536),
    "queries": Range(1, 65_536),
    "max_length": Range(8, 1_048_576),
    "population": Range(1, 1_048_576),
    "accepted": Range(0, 100_000),
}
"""Key of a run, or setting of a task → its range."""

LARGEST = 1e12
"""Absolute value of a received tensor, at most."""


def check(name: str, value: object, allowed: Range | None = None) -> None:
    """Raises WireError, which names all three, for a value outside of its range."""
    allowed = allowed or RANGES[name]
    if not allowed.holds(value):
        raise WireError(f"the task has no usable {name}: expected a {allowed}, found {value!r}")


def check_tensors(payload: Payload) -> None:
    """Raises WireError for a value that is not finite, or larger than LARGEST."""
    for group, params in payload.items():
        for name, tensor in _floating(params):
            low, high = (float(end) for end in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
            worst = high if not math.isfinite(high) or abs(high) > abs(low) else low
            if not abs(worst) <= LARGEST:  # NaN is not
                raise WireError(
                    f"the task has no usable {group}/{name}: expected finite values up to "
                    f"{LARGEST:g}, found {worst:g}"
                )


def _floating(params: Params) -> Iterable[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in params.items() if tensor.is_floating_point())
