"""The question of a round to members who give their updates to secure sums, and its answer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from corolla.sums.quantise import Decoded, Quantiser


@dataclass(frozen=True)
class SumPlan:
    """The values of a round that its members agree on before they train."""

    run_id: str
    round: int
    attempt: int
    task: bytes
    """The hash of what they train from (transcript.task)."""
    quantiser: Quantiser


@dataclass(frozen=True)
class Summed:
    """The outcome of a secure sum, and the bytes that it took beside vectors and tasks."""

    decoded: Decoded
    quantiser: Quantiser
    members: int
    up: int
    down: int


@runtime_checkable
class SumNetwork(Protocol):
    """A network whose members give their updates to secure sums alone."""

    def expect(self, plan: SumPlan) -> None:
        """The next members that are asked to train give their updates to one sum."""

    def summed(self) -> Summed:
        """The sum, when all of them have answered or are given up."""
