"""A clock that a test moves on, for a phone and its gateway; a call that a test answers."""

import threading
from collections.abc import Callable
from typing import Any

from corolla.client.phone.clock import Clock
from corolla.wire.rpc import Method
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World


def lease_of(world: World) -> Any:
    job = world.gateway.rounds.job
    assert job
    (lease,) = job.round.leases.values()
    return lease


def method(call: Callable[[Any], Any], answer: type) -> Method:
    """A method of a stub whose answers, messages of this type, are those of a function."""
    return Method(lambda request, **_: call(request).SerializeToString(), answer)


class Standing(Clock):
    """A clock that stands until a test moves it on."""

    def __init__(self) -> None:
        self.at, self.waiting = 1000.0, 0

    def now(self) -> float:
        return self.at

    def wait(self, event: threading.Event, seconds: float) -> bool:
        due = self.at + seconds
        self.waiting += 1
        while self.at < due and not event.is_set():
            event.wait(0.002)
        self.waiting -= 1
        return event.is_set()

    def outlast(self, world: World, leases: int) -> None:
        """Go on by so many leases, half of one at a time, for as long as they are renewed."""
        for _ in range(2 * leases):
            gateways.until(lambda: self.waiting)  # for the next heartbeat
            self.at += 15.0
            gateways.until(lambda: lease_of(world).ends == self.at + 30.0)
