"""Leases of a gateway's phones, for work until a time: states and what changes them.

Nothing here reads a clock or draws a number: the caller gives both, so that all can be tested.
Times are seconds of one monotonic clock.

    open ── heartbeat ──> open          the lease is longer
    open ── report ─────> reported ──>  valid | refused | given up | late
    open ── its time ends ─> lost       the seat is free, the phone may be asked again

A token may be that of many phones, and one phone can say that it is many. So tokens share a round,
and names do not: while all places are taken, a phone gets that of a token with two more than its
own, and valid replies of one token leave the others the seats that their places are for.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto

from corolla.phones.budget import Assignment
from corolla.server.gateway.shelf import Shelf


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


_WORKING = (Phase.OPEN, Phase.REPORTED, Phase.VALID)
_TURNS = 10
"""Leases that a token may use up in a round, for each place."""


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
    """The text that the phone is told of its reply."""
    assigned: Assignment | None = None
    """The Assignment that a native phone runs."""


@dataclass(frozen=True)
class OfferRound:
    """One task of the gateway: `seats` updates by `deadline`, of phones as they check in.

    At most `places` leases hold a seat at a time, more than `seats` because phones vanish.
    """

    seats: int
    deadline: float
    lease_seconds: float
    over_select: float = 1.3
    leases: Shelf[str, Lease] = field(default_factory=Shelf)
    working: Mapping[str, Lease] = field(default_factory=dict)
    """Those of the leases that hold a seat, oldest first."""
    _last: Shelf[str, str] = field(default_factory=Shelf)
    """Device → its last lease."""
    _turns: Shelf[str, int] = field(default_factory=Shelf)
    """Owner → how many leases it has had."""
    _counts: Mapping[Phase, int] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """How many phones may work at a time, those that are done included."""
        return math.ceil(round(self.over_select * self.seats, 9))

    @property
    def full(self) -> bool:
        """True where there are as many valid updates as were asked for."""
        return self.count(Phase.VALID) >= self.seats

    def over(self, now: float) -> bool:
        """Returns whether no reply that comes now can count."""
        return self.full or now >= self.deadline

    def count(self, *phases: Phase) -> int:
        """How many leases are in one of these phases."""
        return sum(self._counts.get(phase, 0) for phase in phases)

    def expire(self, now: float) -> "OfferRound":
        """Open leases whose time is over are lost."""
        held = self
        for lease in self.working.values():
            if lease.phase == Phase.OPEN and now >= lease.ends:
                held = held._lose(lease, "the lease was over")
        return held

    def open_to(self, device: str) -> Lease | None:
        """The lease that a device has, if its result can still come."""
        own = self.leases.get(self._last.get(device, ""))
        return own if own and own.phase == Phase.OPEN else None

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
        if held.over(now):
            return held, "the round is over"
        own = held.leases.get(held._last.get(device, ""))
        if own and own.phase == Phase.OPEN:
            if own.owner == owner:
                return held._renewed(own, now)
            held = held._lose(own, "the name is another's")
        elif own and own.phase != Phase.LOST:
            return held, "asked already in this round"
        turns = held._turns.get(owner, 0)
        if turns >= _TURNS * held.places:
            return held, "its token has been asked too often in this round"
        full = len(held.working) >= held.places
        taken = held._place_for(owner) if full else None
        if held._has_its_share(owner) or (full and taken is None):
            return held, "enough devices have been chosen"
        if taken:
            held = held._lose(taken, "its place has gone to a phone of another token")
        held = replace(held, _turns=held._turns.put(owner, turns + 1))
        return held._renewed(Lease(id, device, owner, examples, now, assigned=assigned), now)

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
        if now >= self.deadline and not self.full:
            return "the round is over: the deadline has passed"
        return self._too_many(lease)

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
        if phase == Phase.VALID and (late := self._too_many(lease)):
            phase, why = Phase.LATE, late
        return self._with(replace(lease, phase=phase, why=why))

    def _too_many(self, lease: Lease) -> str:
        """Why one more valid reply of a lease's token would be one too many; "" when it is not."""
        if self.full:
            return f"the round is over: {self.seats} others were faster"
        if self._has_its_share(lease.owner):
            return "the other seats of the round are for phones of other tokens"
        return ""

    def _has_its_share(self, owner: str) -> bool:
        """Returns whether a token has as many valid replies as others leave to it, at least one.

        Other tokens have as many seats as their places are for, but for places chosen to spare.
        """
        own = [lease for lease in self.working.values() if lease.owner == owner]
        others = min(len(self.working) - len(own), self.places - 1)
        theirs = max(min(1, others), math.floor(round(others / self.over_select, 9)))
        valid = sum(lease.phase == Phase.VALID for lease in own)
        return valid >= max(1, self.seats - theirs)

    def _place_for(self, owner: str) -> Lease | None:
        """The lease whose place a phone of a token gets while all are taken, if one is.

        The youngest of the token with the most places, at least two more than this token has.
        """
        held = Counter(lease.owner for lease in self.working.values())
        open = [lease for lease in self.working.values() if lease.phase == Phase.OPEN]
        most = max((held[lease.owner] for lease in open), default=0)
        if most < held[owner] + 2:
            return None
        return next(lease for lease in reversed(open) if held[lease.owner] == most)

    def _lose(self, lease: Lease, why: str) -> "OfferRound":
        return self._with(replace(lease, phase=Phase.LOST, why=why))

    def _renewed(self, lease: Lease, now: float) -> tuple["OfferRound", Lease]:
        lease = replace(lease, ends=min(now + self.lease_seconds, self.deadline))
        return self._with(lease), lease

    def _with(self, lease: Lease) -> "OfferRound":
        counts, working, old = {**self._counts}, {**self.working}, self.leases.get(lease.id)
        if old:
            counts[old.phase] -= 1
        counts[lease.phase] = counts.get(lease.phase, 0) + 1
        if lease.phase in _WORKING:
            working[lease.id] = lease
        else:
            working.pop(lease.id, None)
        return replace(
            self,
            leases=self.leases.put(lease.id, lease),
            working=working,
            _last=self._last.put(lease.device, lease.id),
            _counts=counts,
        )


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
