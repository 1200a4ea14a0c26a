"""The thresholds and costs of a run's secure sums, before it is run."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from corolla.config import sums
from corolla.errors import ConfigError, SecureSumError
from corolla.host.text import human_bytes
from corolla.server.rounds import expectations
from corolla.server.rounds.federation import Federation
from corolla.sums import ring, thresholds

_SAMPLE = 1 << 22
"""Values that are masked to measure how fast this machine is."""

_AGREEMENT, _SIGNATURE = 40e-6, 126e-6
"""Seconds of an X25519 agreement and of checking an Ed25519 signature, on one core."""


@dataclass(frozen=True)
class SecureCost:
    """The secure sums of a run: members, thresholds, and the cost of a round.

    `up` and `down` are the bytes of a member beside its vector and its task; seconds are of one
    core, with a tenth of the members lost in training.
    """

    members: int
    corrupt: int
    missing: int
    floor: int
    up: int
    down: int
    client_seconds: float
    server_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def line(self) -> str:
        """A sentence for people."""
        return (
            f"{thresholds.told(self.members, self.corrupt, self.missing)}; "
            f"{human_bytes(self.up)} more sent and {human_bytes(self.down)} more received by a "
            f"client a round; masks take about {self.client_seconds:.2g} s of its processor and "
            f"{self.server_seconds:.2g} s of the server's"
        )


def of(federation: Federation) -> SecureCost | None:
    """The secure sums of a federation; None without. Raises ConfigError where there are none."""
    config = federation.config
    if not config.secure_sum:
        return None
    members = federation.cohort_size
    corrupt = sums.corrupt(config, len(federation.clients))
    try:
        missing = thresholds.most_missing(members, corrupt, config.smallest_sum)
    except SecureSumError as error:
        raise ConfigError(
            f"secure-sum=true: of {len(federation.clients)} clients, {error}"
        ) from error
    values = expectations.masked_bytes(federation, 1) // 4
    up, down = exchanged(members)
    lost = min(missing, members // 10)
    each = seconds_of_masks(values)
    return SecureCost(
        members,
        corrupt,
        missing,
        thresholds.floor(members, corrupt, missing),
        up,
        down,
        members * (each + 2 * _AGREEMENT + 2 * _SIGNATURE),
        (members - lost) * (1 + lost) * each,
    )


def exchanged(members: int) -> tuple[int, int]:
    """Bytes that a member sends and receives in a round, beside vector and task."""
    boxes = 48 * members
    sent = (64 + 32 + 18 + boxes) + (32 + 18 + boxes) + (2 + 33 * members)
    received = (78 + 98 * members) + (26 + 98 * members) + (60 + 100 * members)
    return sent, received


def seconds_of_masks(values: int) -> float:
    """Seconds of one mask of so many values, at the speed that is measured now."""
    vector = np.zeros(_SAMPLE, np.uint32)
    ring.add_masks(vector, [(bytes(32), 1)])
    began = time.process_time()
    ring.add_masks(vector, [(bytes(32), 1), (bytes(32), -1)])
    return (time.process_time() - began) / (2 * _SAMPLE) * values
