"""A member of secure sums as a state machine: it deposits, masks its update, and forgets.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
whose two masks these are, with identities and box keys known before a round, every member a keeper
and every member a neighbour of every other (docs/secure-sums.md). Nothing here reads or writes
files or sockets; what is kept in memory is lost with the process, which is then a member that is
missing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from corolla.errors import SecureSumError
from corolla.sums import boxes, shamir, thresholds, transcript
from corolla.sums.messages import SALT, Deposit, Listing, Masked, Prepare, Session, Shares
from corolla.sums.ring import Mask, Vector, add_masks
from corolla.sums.roster import Roster
from corolla.sums.transcript import Listed

Random = Callable[[int], bytes]
"""Number of bytes → so many random bytes, of the operating system but in tests."""

SEED = 32


class Spent(Protocol):
    """The rounds of which a member has answered for a sum, on a disk that outlives it."""

    def __contains__(self, number: tuple[bytes, int]) -> bool:
        """Whether a (run, round) is spent."""

    def add(self, number: tuple[bytes, int], /) -> None:
        """Spend a (run, round); returns when it is on the disk."""


@dataclass(frozen=True)
class Owner:
    """The wishes of a device's owner: the roster that is pinned, and what a sum must be of.

    `smallest` is the fewest honest updates in a sum, `corrupt` how many members of the whole
    roster may be on the server's side.
    """

    roster: Roster
    index: int
    """The place of this member in the roster."""
    smallest: int = 5
    corrupt: int | None = None
    """None: a tenth of the roster."""

    @property
    def assumed(self) -> int:
        """How many members are taken to be corrupt."""
        if self.corrupt is not None:
            return self.corrupt
        return thresholds.default_corrupt(len(self.roster.entries))


@dataclass
class Accepted:
    """One attempt that a member has accepted, in memory alone."""

    call: Prepare
    prep: bytes
    number: int
    """The member's own place among the seats."""
    agreed: tuple[bytes, ...]
    """The agreement of its box key with each member's."""
    deposit: Deposit
    secret: X25519PrivateKey | None
    """The key of its pair masks, until its reply."""
    context: bytes | None = None
    """The context of its masks, once it has one."""
    listed: tuple[Listed, ...] = ()
    """Who has deposited, once a task has begun."""
    answer: tuple[bytes, Shares] | None = None
    """The question that was answered, as bytes, and the answer."""


@dataclass
class Device:
    """The memory of one member's daemon."""

    owner: Owner
    identity: Ed25519PrivateKey
    spent: Spent
    random: Random = os.urandom
    accepted: Accepted | None = None
    last: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Run → the last (round, attempt) that was accepted."""

    def __post_init__(self) -> None:
        self.box = X25519PrivateKey.from_private_bytes(self.random(SEED))

    def session(self, run: bytes) -> Session:
        """The answer to a hello of a run."""
        name, key = self.owner.roster.name(self.owner.index), boxes.public(self.box)
        text = transcript.session(run, self.owner.roster.sha256, name, key)
        return Session(name, key, self.identity.sign(text))

    def prepare(self, call: Prepare) -> Deposit:
        """Accept an attempt and deposit; asked once more for the same one, in the same bytes.

        Raises SecureSumError for an attempt that the owner's wishes, or an earlier one, forbid.
        """
        prep, now = transcript.prepare(call.fields()), (call.round, call.attempt)
        before = self.accepted
        if before is not None and before.prep == prep:
            return before.deposit
        self._check(call, now)
        number = self._number(call)
        agreed = tuple(boxes.agree(self.box, seat.box_key) for seat in call.seats)
        seed = self.random(SEED)
        secret = X25519PrivateKey.from_private_bytes(transcript.attempt_secret(seed, prep))
        key, salt = boxes.public(secret), self.random(SALT)
        shares = self._split(seed, call)
        sealed = boxes.seal_all(b"k", prep + key, number, agreed, salt, shares)
        signature = self.identity.sign(transcript.deposit(prep, key))
        deposit = Deposit(key, signature, salt, sealed)
        self.last[call.run] = now
        self.accepted = Accepted(call, prep, number, agreed, deposit, secret)
        return deposit

    def begin(self, listing: Listing, task: bytes) -> None:
        """Accept who has deposited, before the training of `task` (transcript.task) begins.

        Raises SecureSumError for a list that another attempt, or no member, can have; once only.
        """
        own = self._of(listing.run, listing.round, listing.attempt)
        if own.context is not None or own.answer is not None:
            raise SecureSumError("a second task of one attempt: refused")
        if len(listing.members) < own.call.needed:
            raise SecureSumError(
                f"{len(listing.members)} members have deposited, {own.call.needed} are needed"
            )
        self._check_listing(own, listing)
        listed = tuple((member.number, member.key) for member in listing.members)
        own.context = transcript.context(own.prep, task, listed)
        own.listed = listed

    def mask(self, vector: Vector) -> Masked:
        """The masked vector, of the task that has begun; then the keys are forgotten.

        Raises SecureSumError where no task has begun, or it was answered before.
        """
        own = self.accepted
        if own is None or own.context is None or own.secret is None or own.answer is not None:
            raise SecureSumError("no task of this attempt has begun, or it was answered")
        secret, own.secret = own.secret, None
        if len(vector) != own.call.quantiser.size:
            raise SecureSumError(
                f"a vector of {len(vector)} values, expected {own.call.quantiser.size}"
            )
        mask, salt = self.random(SEED), self.random(SALT)
        masks: list[Mask] = [(transcript.self_key(mask, own.context, own.number), 1)]
        for other, key in own.listed:
            if other != own.number:
                shared = boxes.agree(secret, key)
                pair = transcript.pair_key(shared, own.context, own.number, other)
                masks.append((pair, 1 if own.number < other else -1))
        masked = np.array(vector, np.uint32)
        add_masks(masked, masks)
        shares = self._split(mask, own.call)
        sealed = boxes.seal_all(b"m", own.context, own.number, own.agreed, salt, shares)
        commitment = transcript.commitment(own.context, own.number, mask)
        return Masked(masked, salt, sealed, commitment)

    def _check(self, call: Prepare, now: tuple[int, int]) -> None:
        """Raises SecureSumError for an attempt that may not be accepted."""
        owner = self.owner
        if call.roster_sha256 != owner.roster.sha256:
            raise SecureSumError("the roster is another one than this device pins")
        if call.round < 1 or now <= self.last.get(call.run, (0, -1)):
            raise SecureSumError(
                f"round {call.round}, attempt {call.attempt} is not after the last one: refused"
            )
        if (call.run, call.round) in self.spent:
            raise SecureSumError(f"round {call.round} is spent: this device has answered for it")
        thresholds.check(len(call.seats), owner.assumed, call.missing, owner.smallest)
        call.quantiser.check()
        owner.roster.check_sessions(call.run, call.seats)

    def _number(self, call: Prepare) -> int:
        """The own place among the seats. Raises SecureSumError where it has another box key."""
        for number, seat in enumerate(call.seats):
            if seat.index == self.owner.index:
                if seat.box_key != boxes.public(self.box):
                    raise SecureSumError("the attempt has another box key of this device")
                return number
        raise SecureSumError("this device is not a member of the attempt")

    def _split(self, secret: bytes, call: Prepare) -> list[bytes]:
        threshold = call.needed
        coefficients = self.random(SEED * (threshold - 1))
        return shamir.split(secret, threshold, len(call.seats), coefficients)

    def _of(self, run: bytes, round: int, attempt: int) -> Accepted:
        own = self.accepted
        if own is None or (own.call.run, own.call.round, own.call.attempt) != (run, round, attempt):
            raise SecureSumError(f"round {round}, attempt {attempt} was not accepted here")
        return own

    def _check_listing(self, own: Accepted, listing: Listing) -> None:
        last, roster = -1, self.owner.roster
        for member in listing.members:
            if not last < member.number < len(own.call.seats):
                raise SecureSumError(
                    f"member {member.number} is not of the attempt, or not in order"
                )
            last, seat = member.number, own.call.seats[member.number]
            text = transcript.deposit(own.prep, member.key)
            if not boxes.signed(roster.key(seat.index), member.signature, text):
                raise SecureSumError(f"the deposit of {roster.name(seat.index)!r} is not signed")
        keys = {member.number: member.key for member in listing.members}
        if keys.get(own.number) != own.deposit.key:
            raise SecureSumError("the own deposit is missing, or was changed")


def refuse_plain(owner: Owner | None, kind: str) -> None:
    """Raises SecureSumError where a device with a roster is asked for a plain update.

    Else a server that cannot open a sum would ask once more, without masks.
    """
    if owner is not None:
        raise SecureSumError(
            f"a plain {kind} task is refused: this device was started with a roster, and gives its "
            f"updates to secure sums alone"
        )
