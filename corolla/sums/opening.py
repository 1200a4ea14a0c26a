"""The server's side of one attempt at a secure sum, as a state machine without files or sockets.

It holds one vector, whatever the number of members: masked vectors are added as they come, and the
masks are taken off the sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from corolla.errors import SecureSumError
from corolla.sums import boxes, ring, shamir, transcript
from corolla.sums.messages import (
    Deposit,
    Deposited,
    Listing,
    Masked,
    Prepare,
    Question,
    Seat,
    Shares,
)
from corolla.sums.ring import Mask, Vector
from corolla.sums.roster import Roster


@dataclass(frozen=True)
class Opened:
    """The sum of one attempt: Σ of the vectors of `members`, modulo 2^32."""

    total: Vector
    members: tuple[int, ...]
    wrong: tuple[int, ...] = ()
    """Members whose shares were of no use: their answers were left out."""


@dataclass
class Opening:
    """One attempt: its deposits, the sum of masked vectors, and the answers of keepers.

    `corrupt` is how many members the server takes to be corrupt, to tell a bad dealer of shares
    from keepers who say that they cannot open.
    """

    call: Prepare
    roster: Roster
    corrupt: int
    deposits: dict[int, Deposit] = field(default_factory=dict)
    listing: Listing | None = None
    task: bytes = b""
    replies: dict[int, Masked] = field(default_factory=dict)
    """Boxes and commitments of replies; their vectors are added up, and not kept."""
    answered: tuple[int, ...] | None = None
    """The members whose vectors are in the sum, once it is closed."""
    shares: dict[int, Shares] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.call.quantiser.size, np.uint32)
        self.prep = transcript.prepare(self.call.fields())
        self.context = b""

    def deposit(self, number: int, deposit: Deposit) -> None:
        """Take the deposit of a member. Raises SecureSumError for one that is not valid."""
        seat = self._seat(number)
        if self.listing is not None or number in self.deposits:
            raise SecureSumError("the deposit comes late, or twice", named=[number])
        text = transcript.deposit(self.prep, deposit.key)
        if not boxes.signed(self.roster.key(seat.index), deposit.signature, text):
            raise SecureSumError("the deposit is not signed", named=[number])
        boxes.agree(X25519PrivateKey.generate(), deposit.key)  # else no member would go on
        self._check_boxes(number, deposit.boxes)
        self.deposits[number] = deposit

    def announce(self, task: bytes) -> Listing:
        """Close the deposits: who will be asked to train on `task`, by whom all are told.

        Raises SecureSumError where there are too few: another attempt may follow.
        """
        if self.listing is not None:
            return self.listing
        self._require(len(self.deposits), "deposited")
        members = tuple(
            Deposited(n, self.deposits[n].key, self.deposits[n].signature)
            for n in sorted(self.deposits)
        )
        self.task = task
        listed = ((member.number, member.key) for member in members)
        self.context = transcript.context(self.prep, task, listed)
        self.listing = Listing(self.call.run, self.call.round, self.call.attempt, members)
        return self.listing

    def reply(self, number: int, masked: Masked) -> None:
        """Add the masked vector of a member. Raises SecureSumError for one that may not be."""
        if self.listing is None or number not in self.deposits:
            raise SecureSumError("the member was not asked", named=[number])
        if self.answered is not None or number in self.replies:
            raise SecureSumError("the reply comes late, or twice: dropped", named=[number])
        if masked.vector.shape != self.total.shape:
            raise SecureSumError("the vector has another length", named=[number])
        self._check_boxes(number, masked.boxes)
        ring.add(self.total, masked.vector)
        self.replies[number] = Masked(self.total[:0], masked.salt, masked.boxes, masked.commitment)

    def close(self) -> tuple[int, ...]:
        """Close the sum: whose vectors are in it. What a server writes down before it goes on.

        Raises SecureSumError where there are too few: another attempt may follow.
        """
        if self.answered is None:
            self._require(len(self.replies), "answered")
            self.answered = tuple(sorted(self.replies))
        return self.answered

    def question(self, keeper: int) -> Question:
        """The question for one member, the same whenever it is asked."""
        if self.answered is None or self.listing is None:
            raise SecureSumError("the sum is not closed yet")
        held: list[tuple[bytes, bytes]] = []
        for number in sorted(self.deposits):
            source = self.replies[number] if number in self.replies else self.deposits[number]
            held.append((source.salt, source.boxes[keeper]))
        listed = tuple((member.number, member.key) for member in self.listing.members)
        call = self.call
        return Question(
            call.run, call.round, call.attempt, self.task, listed, self.answered, tuple(held)
        )

    def answer(self, keeper: int, shares: Shares) -> None:
        """Take the answer of a keeper. Raises SecureSumError for one that is none."""
        self._seat(keeper)
        if self.answered is None or len(shares.shares) != len(self.deposits):
            raise SecureSumError("the answer is to no question of this sum", named=[keeper])
        if keeper in self.shares:
            raise SecureSumError("the answer comes twice: dropped", named=[keeper])
        self.shares[keeper] = shares

    def open(self) -> Opened:
        """The sum without its masks.

        Raises SecureSumError where too few have answered, or a member has dealt shares that fit
        nothing: the round is lost, and the member named.
        """
        usable, silent = self._usable()
        if len(usable) < self.call.needed:
            raise SecureSumError(
                f"{len(usable)} members have answered for the sum, {self.call.needed} are needed: "
                f"round {self.call.round} is lost"
            )
        secrets, wrong = self._secrets(usable)
        total = self.total.copy()
        ring.add_masks(total, self._masks(secrets))
        return Opened(total, self.close(), tuple(sorted({*silent, *wrong})))

    def _usable(self) -> tuple[Mapping[int, Sequence[bytes]], list[int]]:
        """The answers with a share of every member, and the keepers of others.

        Raises SecureSumError, and names who dealt, where more members than may be corrupt cannot
        open its boxes.
        """
        for place, number in enumerate(sorted(self.deposits)):
            closed = sum(answer.shares[place] is None for answer in self.shares.values())
            if closed > self.corrupt:
                raise self._bad_dealers([number])
        usable = {}
        for keeper, answer in sorted(self.shares.items()):
            shares = [share for share in answer.shares if share is not None]
            if len(shares) == len(answer.shares):
                usable[keeper] = shares
        return usable, [keeper for keeper in self.shares if keeper not in usable]

    def _secrets(self, usable: Mapping[int, Sequence[bytes]]) -> tuple[dict[int, bytes], list[int]]:
        """The secret of each member, checked; and the keepers whose shares were wrong.

        Each answer is left out in turn where the first ones do not fit: one keeper that lies is
        found if there is one more answer than needed.
        """
        first = list(usable)[: self.call.needed]
        secrets, bad = self._combined(usable, first)
        if not bad:
            return secrets, []
        spare = list(usable)[self.call.needed :][:1]
        for some in combinations([*first, *spare], self.call.needed) if spare else ():
            found, still = self._combined(usable, some)
            if not still:
                return found, sorted({*first, *spare} - set(some))
            bad = min(bad, still, key=len)
        if len(bad) == len(secrets):
            raise SecureSumError(
                f"the answers of several keepers are wrong, and nobody can be named: round "
                f"{self.call.round} is lost"
            )
        raise self._bad_dealers(bad)

    def _combined(
        self, usable: Mapping[int, Sequence[bytes]], keepers: Sequence[int]
    ) -> tuple[dict[int, bytes], list[int]]:
        """The secret of each member from these answers, and the members whose do not check."""
        row = shamir.row([keeper + 1 for keeper in keepers])
        arrays = [
            np.frombuffer(b"".join(usable[keeper]), np.uint8).reshape(-1, shamir.SECRET)
            for keeper in keepers
        ]
        found = shamir.combine(row, arrays)
        secrets = {n: found[i].tobytes() for i, n in enumerate(sorted(self.deposits))}
        return secrets, [n for n, secret in secrets.items() if not self._checks(n, secret)]

    def _checks(self, number: int, secret: bytes) -> bool:
        """Whether a secret is what its member has told before."""
        if number in self.replies:
            told = transcript.commitment(self.context, number, secret)
            return told == self.replies[number].commitment
        return boxes.public(self._key(secret)) == self.deposits[number].key

    def _masks(self, secrets: Mapping[int, bytes]) -> Iterator[Mask]:
        """The masks that are left in the sum, to be taken off."""
        ctx = self.context
        for number, secret in secrets.items():
            if number in self.replies:
                yield transcript.self_key(secret, ctx, number), -1
                continue
            key = self._key(secret)
            for other in self.close():
                shared = boxes.agree(key, self.deposits[other].key)
                pair = transcript.pair_key(shared, ctx, number, other)
                yield pair, -1 if other < number else 1

    def _key(self, seed: bytes) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(transcript.attempt_secret(seed, self.prep))

    def _seat(self, number: int) -> Seat:
        if not 0 <= number < len(self.call.seats):
            raise SecureSumError(f"member {number} is not of the attempt")
        return self.call.seats[number]

    def _check_boxes(self, number: int, held: Sequence[bytes]) -> None:
        if len(held) != len(self.call.seats):
            raise SecureSumError("there is not one box for each member", named=[number])

    def _require(self, found: int, what: str) -> None:
        if found < self.call.needed:
            raise SecureSumError(
                f"round {self.call.round}: {found} of {len(self.call.seats)} members have {what}, "
                f"{self.call.needed} are needed",
                again=True,
            )

    def _bad_dealers(self, numbers: Sequence[int]) -> SecureSumError:
        names = ", ".join(self.roster.name(self.call.seats[n].index) for n in numbers)
        return SecureSumError(
            f"the shares that {names} dealt fit nothing: round {self.call.round} is lost, leave "
            f"{names} out of the next",
            named=numbers,
        )
