"""A budget as a setting says it: a share of operations, bytes or memory."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

Unit = Literal["flops", "bytes", "memory"]

MEANING = {
    "flops": "operations of the backward pass",
    "bytes": "bytes of an update",
    "memory": "bytes of memory that what is trained decides",
}
"""Quantity → the total that a share is of: all that training everything takes."""


@dataclass(frozen=True)
class Budget:
    """A share of what training every candidate takes."""

    text: str
    unit: Unit
    share: Fraction

    def of(self, total: int) -> int:
        """The largest whole cost within the budget."""
        return int(self.share * total)


def read(text: str) -> Budget:
    """A Budget of a setting that the config has checked: `flops:0.5`."""
    unit, _, share = text.partition(":")
    return Budget(text, cast(Unit, unit), Fraction(share))
