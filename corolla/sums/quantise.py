"""Quantised updates: whole numbers of 24 bits with their weight, whose sums are exact.

A member's vector holds (w / W) · u / R · (2^23 - 1), rounded at random and without bias, and after
it the slots: its weight w, whether its update was clipped, its norm and its loss. Of at most 255
members the sum stays below 2^31, so that it never wraps.
"""

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from corolla.directions import signs
from corolla.errors import SecureSumError
from corolla.sums.ring import Vector

LEVELS = (1 << 23) - 1
"""The largest number that a member adds to a value, up or down."""

SLOTS = 4
"""Weight, clipped, norm and loss, after the values."""

MOST_VALUES = 1 << 30
"""Values of a vector at most: 4 GiB."""

FIRST_BOUND = 16.0
"""The bound on norms of updates in the first round, before a norm is known."""

LARGEST_LOSS = 16.0
"""The largest loss that the slot of losses holds."""

_PIECE = 1 << 15
"""Values that are rounded at a time: they stay in the cache."""

_STREAM = 1 << 32
"""The first of the Philox streams that round: those below it draw directions and signs."""


@dataclass(frozen=True)
class Quantiser:
    """How the updates of a round become whole numbers.

    `bound` is R, the largest L2 norm of an update; `weight` is W, the largest weight; `values`
    counts those of an update.
    """

    bound: float
    weight: int
    values: int

    PACKED: ClassVar[int] = 18

    @property
    def size(self) -> int:
        """Whole numbers of a vector, the slots among them."""
        return self.values + SLOTS

    def pack(self) -> bytes:
        """The 18 bytes of the fields, R in fp64, and the number of slots."""
        return struct.pack("<dIIH", self.bound, self.weight, self.values, SLOTS)

    @classmethod
    def unpack(cls, data: bytes) -> "Quantiser":
        """The quantiser of 18 bytes. Raises SecureSumError for numbers that it cannot have."""
        bound, weight, values, slots = struct.unpack("<dIIH", data)
        quantiser = cls(bound, weight, values)
        quantiser.check()
        if slots != SLOTS:
            raise SecureSumError(f"{slots} slots, this version has {SLOTS}")
        return quantiser

    def check(self) -> None:
        """Raises SecureSumError for numbers that make no sums."""
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise SecureSumError(f"the bound on norms is {self.bound:g}, not a positive number")
        if not 1 <= self.weight <= LEVELS:
            raise SecureSumError(f"the largest weight is {self.weight}, not 1 to {LEVELS}")
        if not 1 <= self.values <= MOST_VALUES:
            raise SecureSumError(f"a vector has {self.values} values, not 1 to {MOST_VALUES}")

    def error(self, weight: int, norm: float) -> float:
        """The relative L2 error of one update of this weight and norm, at most in the mean.

        (W / w) · (R / ‖u‖) · √d / 2^24: rounding at random has a variance of at most 1/4.
        """
        return self.weight / weight * self.bound / norm * math.sqrt(self.values) / (1 << 24)


@dataclass(frozen=True)
class Contribution:
    """One member's update: its values (d,), its weight and its loss."""

    values: NDArray[np.float64]
    weight: int
    loss: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """The sums of a round: Σ w u (d,) in fp64, and those of the slots."""

    values: NDArray[np.float64]
    weight: int
    clipped: int
    norm: float
    """Σ w · min(‖u‖, R)."""
    loss: float
    """Σ w · loss."""


def rounding(seed: int, round: int, member: int, count: int) -> NDArray[np.uint32]:
    """Random words (count,) for the rounding of one member, from the run's Philox streams.

    The same in a run that is resumed. Secrecy does not rest on them.
    """
    words = signs.words((seed, round), 0, (count + 1) // 2, _STREAM + member)
    return words.astype("<u8", copy=False).view("<u4")[:count]


def quantise(quantiser: Quantiser, update: Contribution, random: NDArray[np.uint32]) -> Vector:
    """The vector (d + 4,) of one update; `random` are words (d + 4,) that decide its rounding.

    An update longer than R is made as long as R. Raises SecureSumError for values that are not
    finite, and for a weight that is not 1 to W.
    """
    values = update.values
    if values.shape != (quantiser.values,):
        raise SecureSumError(f"an update of {values.shape} values, expected {quantiser.values}")
    if not 1 <= update.weight <= quantiser.weight:
        raise SecureSumError(f"a weight of {update.weight}, not 1 to {quantiser.weight}")
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(values))
    if not (math.isfinite(norm) and math.isfinite(update.loss)):
        raise SecureSumError("the update has values that are not finite")
    share, bound = update.weight / quantiser.weight, quantiser.bound
    clipped = norm > bound
    scale = share * LEVELS / (norm if clipped else bound)
    loss = min(max(update.loss / LARGEST_LOSS, -1.0), 1.0)
    slots = [update.weight, int(clipped), share * min(norm / bound, 1) * LEVELS]
    slots += [share * loss * LEVELS]
    vector = np.empty(quantiser.size, np.int32)
    for start in range(0, quantiser.values, _PIECE):
        place = slice(start, min(start + _PIECE, quantiser.values))
        vector[place] = _rounded(values[place] * scale, random[place])
    vector[quantiser.values :] = _rounded(np.array(slots), random[quantiser.values :])
    return vector.view(np.uint32)


def _rounded(exact: NDArray[np.float64], random: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Whole numbers below or above `exact`, which is overwritten: in the mean what it was."""
    exact += random * 2.0**-32
    np.floor(exact, out=exact)
    return np.clip(exact, -LEVELS, LEVELS, out=exact)


def decode(quantiser: Quantiser, total: Vector, members: int) -> Decoded:
    """The sums in the vectors of so many members.

    Raises SecureSumError for sums that honest members cannot have: a weight outside of
    [members, members · W], a norm beyond R · Σ w and what rounding adds, and other slots beyond
    what this weight allows.
    """
    whole = total.view(np.int32).astype(np.float64)
    unit = quantiser.bound * quantiser.weight / LEVELS
    values, slots = whole[: quantiser.values] * unit, whole[quantiser.values :]
    weight, clipped = int(slots[0]), int(slots[1])
    if not members <= weight <= members * quantiser.weight:
        raise SecureSumError(
            f"the sum has a weight of {weight}, {members} members have {members} to "
            f"{members * quantiser.weight}: the round is lost"
        )
    noise = math.sqrt(members * quantiser.values) * quantiser.bound * quantiser.weight / (1 << 23)
    norm, most = float(np.linalg.norm(values)), 1.01 * quantiser.bound * weight + noise
    if not norm <= most:
        raise SecureSumError(
            f"the sum has a norm of {norm:.4g}, at most {most:.4g} is honest: the round is lost"
        )
    full = weight / quantiser.weight * LEVELS + members  # of norms of R, of the largest losses
    if not (0 <= clipped <= members and 0 <= slots[2] <= full and abs(slots[3]) <= full):
        raise SecureSumError(
            f"the sum counts {clipped} clipped updates, a norm of {slots[2]:.0f} and a loss of "
            f"{slots[3]:.0f} levels, {members} members have at most {members} and {full:.0f}: the "
            f"round is lost"
        )
    of_losses = quantiser.weight * LARGEST_LOSS / LEVELS
    return Decoded(values, weight, clipped, slots[2] * unit, slots[3] * of_losses)


def next_bound(found: Decoded) -> float:
    """The bound of the next round: twice the mean norm of this one, as a power of two above it."""
    return float(2.0 ** math.ceil(math.log2(2 * found.norm / found.weight)))


def within(clip: float, values: int) -> float:
    """The bound with which no update is longer than `clip` after rounding: clip / (1 + √d / M).

    Rounding moves each of d values by less than a level, of which there are M = 2^23 - 1 in the
    bound: what noise of differential privacy is made for holds for what is added up.
    """
    return clip / (1 + math.sqrt(values) / LEVELS)
