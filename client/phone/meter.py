"""The meter counts bytes and seconds of a day against the limits of owner and gateway.

All calls have this one meter. It is asked before each call and told after it, so that no lease,
download or visit is beside it.
"""

import threading
from collections.abc import Sequence

from corolla.client.phone import policies
from corolla.client.phone.clock import Clock
from corolla.client.phone.policies import Entry, Spent
from corolla.proto import device_pb2 as pb

LEAST_SECONDS = 1.0
"""Seconds that a call gets, however few are left of the day."""


class SessionOverError(Exception):
    """Nothing can come of a session any more. Never leaves this package."""


class UsedUpError(SessionOverError):
    """A limit of the day is reached, or a call would go over it. Never leaves this package."""


class Meter:
    """Counts what was spent since the last entry of the history, beside what that holds of today.

    Time counts while the device works for a lease, and while a call takes place without one.
    Heartbeats are counted from a thread of their own.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes, self._seconds = 0, 0.0
        self._began: float | None = None  # of the lease
        self._policy, self._today = pb.Policy(), Spent()

    def limit(self, policy: pb.Policy, history: Sequence[Entry], now: float) -> None:
        """From now on `policy` holds, an owner's limits in it; `history` is up to the last entry.

        `now` counts seconds since 1970.
        """
        self._policy, self._today = policy, policies.spent_today(history, now)

    def works(self) -> None:
        """A lease begins, whose time counts until `settle`."""
        self._began = self._clock.now()

    def spent(self, battery: float = 0.0) -> Spent:
        """Since the last entry; `battery` is in percent of a full charge."""
        working = 0.0 if self._began is None else self._clock.now() - self._began
        return Spent(self._bytes, self._seconds + working, battery)

    def settle(self) -> None:
        """An entry of the history has what was spent."""
        with self._lock:
            self._bytes, self._seconds, self._began = 0, 0.0, None

    def ask(self, coming: int = 0) -> float:
        """Seconds that a call may take whose answer has about `coming` bytes.

        Raises UsedUpError when the limits of a day do not allow it.
        """
        spent = self.spent() + self._today
        if lacks := policies.used_up(self._policy, spent):
            raise UsedUpError(policies.in_words(lacks))
        most = self._policy.daily_bytes
        if most and spent.bytes + coming > most:
            raise UsedUpError(policies.in_words(["daily-bytes"]))
        left = self._policy.daily_seconds - spent.seconds
        return max(LEAST_SECONDS, left) if self._policy.daily_seconds else float("inf")

    def count(self, bytes: int, seconds: float) -> None:
        """A call has sent and received so many bytes in so many seconds."""
        with self._lock:
            self._bytes += bytes
            if self._began is None:
                self._seconds += seconds
