"""Who of a gateway's phones works on what, until when: states and what changes them.

Nothing here reads a clock or draws a number: the caller gives both, so that all can be tested.
Times are seconds of one monotonic clock.

    open ── heartbeat ──> open          the lease is longer
    open ── report ─────> reported ──>  valid | refused | given up | late
    open ── its time ends ─> lost       the seat is free, the phone may be asked again
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto

from corolla.server.gateway.budget import Assignment


class Phase(StrEnum):
    """Where a lease stands."""

    OPEN = auto()
    REPORTED = auto()
    """Its reply has come in time and is being examined."""
    VALID = auto()
    REFUSED = auto()
    GIVEN_UP = auto()
    LATE = auto()
    LOST = auto()
    """Nothing was heard in time."""


_HOLDS_A_SEAT = (Phase.OPEN, Phase.REPORTED, Phase.VALID)


@dataclass(frozen=True)
class Lease:
    """One phone's turn in a round. `owner` is who may speak for it (a digest of its token)."""

    id: str
    device: str
    owner: str
    examples: int
    ends: float
    phase: Phase = Phase.OPEN
    why: str = ""
    """What its phone is told of its reply."""
    assigned: Assignment | None = None
    """What a native phone runs."""


@dataclass(frozen=True)
class OfferRound:
    """One task of the gateway: `seats` updates by `deadline`, of phones as they check in.

    At most `places` leases hold a seat at a time, more than `seats` because phones vanish.
    """

    seats: int
    deadline: float
    lease_seconds: float
    over_select: float = 1.3
    leases: Mapping[str, Lease] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """How many phones may work at a time, those that are done included."""
        return math.ceil(round(self.over_select * self.seats, 9))

    @property
    def full(self) -> bool:
        """Whether there are as many valid updates as were asked for."""
        return self.count(Phase.VALID) >= self.seats

    def over(self, now: float) -> bool:
        """Whether nothing that comes now can count."""
        return self.full or now >= self.deadline

    def count(self, *phases: Phase) -> int:
        """How many leases are in one of these phases."""
        return sum(lease.phase in phases for lease in self.leases.values())

    def expire(self, now: float) -> "OfferRound":
        """Open leases whose time is over are lost."""
        lost = {
            id: replace(lease, phase=Phase.LOST, why="the lease was over")
            for id, lease in self.leases.items()
            if lease.phase == Phase.OPEN and now >= lease.ends
        }
        return replace(self, leases={**self.leases, **lost}) if lost else self

    def open_to(self, device: str) -> Lease | None:
        """The lease that a device has, if its result can still come."""
        own = (lease for lease in self.leases.values() if lease.device == device)
        return next((lease for lease in own if lease.phase == Phase.OPEN), None)

    def check_in(
        self,
        device: str,
        owner: str,
        examples: int,
        id: str,
        now: float,
        assigned: Assignment | None = None,
    ) -> tuple["OfferRound", Lease | str]:
        """A lease under `id`, or why there is none. A device that has one gets the same again."""
        held = self.expire(now)
        own = [lease for lease in held.leases.values() if lease.device == device]
        if held.over(now):
            return held, "the round is over"
        for lease in own:
            if lease.phase == Phase.OPEN and lease.owner == owner:
                return held._renewed(lease, now)
            if lease.phase == Phase.OPEN:  # the name has gone to another device
                held = held._with(replace(lease, phase=Phase.LOST, why="the name is another's"))
        own = [held.leases[lease.id] for lease in own]
        if any(lease.phase != Phase.LOST for lease in own):
            return held, "asked already in this round"
        if held.count(*_HOLDS_A_SEAT) >= held.places:
            return held, "enough devices have been chosen"
        lease = Lease(id, device, owner, examples, now, assigned=assigned)
        return held._renewed(lease, now)

    def heartbeat(self, id: str, now: float) -> tuple["OfferRound", float]:
        """The seconds that the lease lasts now; 0 when its result is not wanted any more."""
        held = self.expire(now)
        lease = held.leases.get(id)
        if lease is None or lease.phase != Phase.OPEN or held.over(now):
            return held, 0.0
        held, lease = held._renewed(lease, now)
        return held, lease.ends - now

    def refuses(self, id: str, now: float) -> str:
        """Why nothing is taken for a lease now; "" when it is."""
        lease = self.leases.get(id)
        if lease is None:
            return "the lease is of an earlier round"
        if lease.phase == Phase.REPORTED:
            return "it is being examined"
        if lease.phase != Phase.OPEN:
            return lease.why or "reported already"
        if now >= lease.ends:
            return "the lease was over"
        if self.full:
            return f"the round is over: {self.seats} others were faster"
        return "the round is over: the deadline has passed" if now >= self.deadline else ""

    def report(self, id: str, now: float) -> tuple["OfferRound", str]:
        """Take a reply in for examination, once; "" or why not, which is its last word."""
        held = self.expire(now)
        why = held.refuses(id, now)
        lease = held.leases.get(id)
        if lease is None or lease.phase != Phase.OPEN:
            return held, why
        phase = Phase.LATE if why else Phase.REPORTED
        return held._with(replace(lease, phase=phase, why=why)), why

    def settle(self, id: str, phase: Phase, why: str) -> "OfferRound":
        """The verdict on a reply that was taken in; what would be one too many is late."""
        lease = self.leases[id]
        if lease.phase != Phase.REPORTED:
            return self
        if phase == Phase.VALID and self.full:
            phase, why = Phase.LATE, f"the round is over: {self.seats} others were faster"
        return self._with(replace(lease, phase=phase, why=why))

    def _renewed(self, lease: Lease, now: float) -> tuple["OfferRound", Lease]:
        lease = replace(lease, ends=min(now + self.lease_seconds, self.deadline))
        return self._with(lease), lease

    def _with(self, lease: Lease) -> "OfferRound":
        return replace(self, leases={**self.leases, lease.id: lease})


@dataclass(frozen=True)
class Bucket:
    """Calls that a peer may make: `burst` at once, `rate` a second after that."""

    left: float
    at: float

    def take(self, now: float, rate: float, burst: float) -> tuple["Bucket", bool]:
        """One call: whether it is allowed."""
        left = min(burst, self.left + (now - self.at) * rate)
        allowed = left >= 1
        return Bucket(left - 1 if allowed else left, now), allowed
