"""A lease that is kept while the phone works, and whether the work is still worth it."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from corolla.client.phone import policies
from corolla.client.phone.channel import Caller
from corolla.client.phone.policies import Entry, Spent
from corolla.proto import device_pb2 as pb

_EVERY = 0.5
"""Seconds between two looks at the device's conditions, while it trains."""
_SHORTEST = 0.1
"""Seconds between two heartbeats, at least."""


class Alive:
    """Renews a lease in a thread of its own, because a step may take long.

    All else belongs to the thread that trains: it asks between two steps.
    """

    def __init__(
        self,
        caller: Caller,
        lease: pb.Lease,
        policy: pb.Policy,
        conditions: Callable[[], Mapping[str, Any]],
        history: Sequence[Entry],
    ) -> None:
        """`history`: what the device had done when the lease began."""
        self._caller, self._lease = caller, lease
        self._policy, self._conditions, self._history = policy, conditions, history
        self._clock = caller.clock
        self._charge = self._battery()
        self._due = 0.0
        self._over = threading.Event()
        self._timer = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.why = ""
        """Why the task is to be given up; "" while it is not."""

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._timer.join()

    def check(self) -> bool:
        """False once the task is to be given up."""
        now = self._clock.now()
        if not self.why and now >= self._due:
            self._due = now + _EVERY
            self.why = self._lapsed()
        return not self.why

    def spent(self) -> Spent:
        """Returns the Spent since the last entry of the history; a charger gives nothing back."""
        return self._caller.meter.spent(max(0.0, self._charge - self._battery()))

    def _beat(self) -> None:
        """Renew the lease, three times in its time."""
        pause = max(_SHORTEST, self._lease.seconds / 3)
        while not self._clock.wait(self._over, pause) and not self.why:
            request = pb.HeartbeatRequest(lease=self._lease.id)
            found = self._caller.once(self._caller.stub.Heartbeat, request, pause)
            if found is not None and not found.wanted:  # else the lease outlives two of these
                self.why = "not wanted any more"

    def _lapsed(self) -> str:
        """Returns the first reason to give up the task, in words; "" while there is none.

        A reason is that the device was stopped, or a condition of the policy that holds no more.
        """
        if self._caller.stop.is_set():
            return "the device was stopped"
        lacks = policies.while_training(
            self._policy,
            self._conditions(),
            self._history,
            self._clock.date(),
            self.spent(),
        )
        first = policies.in_words(lacks[:1])
        return first + " any more" * first.startswith("not ")

    def _battery(self) -> float:
        return float(self._conditions().get("battery_percent", 0))
