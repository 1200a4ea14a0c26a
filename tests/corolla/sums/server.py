"""What a server that lies does with the messages of secure sums, and with members on its side."""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from corolla.errors import SecureSumError
from corolla.sums import boxes, keeper, ring, shamir, transcript
from corolla.sums.device import Device
from corolla.sums.messages import Deposit, Deposited, Listing, Masked, Prepare, Question
from corolla.sums.ring import Vector
from tests.corolla.sums.members import TASK, Group

Key = tuple[int, bytes]
"""A member, and b"m" or b"k": whose secret, and which of the two."""


@dataclass
class Liar:
    """A server of one attempt that keeps everything, and asks each member what it likes."""

    group: Group
    call: Prepare
    deposits: dict[int, Deposit] = field(default_factory=dict)
    replies: dict[int, Masked] = field(default_factory=dict)
    shares: dict[Key, dict[int, bytes]] = field(default_factory=dict)
    """Whose secret → keeper → its share."""

    @classmethod
    def of(cls, group: Group, round: int = 1, attempt: int = 0) -> "Liar":
        """A server to which all members have deposited."""
        server = cls(group, group.call(round, attempt))
        for number, device in enumerate(group.devices):
            server.deposits[number] = device.prepare(server.call)
        return server

    @property
    def prep(self) -> bytes:
        """The hash of the attempt."""
        return transcript.prepare(self.call.fields())

    def listing(self, who: Iterable[int], keys: Mapping[int, bytes] | None = None) -> Listing:
        """The list of who has deposited, with other keys than they have sent where it has any."""
        members = tuple(
            Deposited(n, (keys or {}).get(n, self.deposits[n].key), self.deposits[n].signature)
            for n in who
        )
        return Listing(self.call.run, self.call.round, self.call.attempt, members)

    def context(self, listing: Listing, task: bytes = TASK) -> bytes:
        """The context of a list."""
        return transcript.context(self.prep, task, [(m.number, m.key) for m in listing.members])

    def train(self, number: int, vector: Vector, listing: Listing, task: bytes = TASK) -> None:
        """A member masks its vector."""
        device = self.group.devices[number]
        device.begin(listing, task)
        self.replies[number] = device.mask(vector)

    def question(
        self, to: int, listing: Listing, answered: Collection[int], task: bytes = TASK
    ) -> Question:
        """A question with the boxes that the server has."""
        held = []
        for member in listing.members:
            sent: Masked | Deposit = self.deposits[member.number]
            if member.number in answered:
                sent = self.replies.get(member.number, sent)
            held.append((sent.salt, sent.boxes[to]))
        listed = tuple((m.number, m.key) for m in listing.members)
        call = self.call
        return Question(
            call.run, call.round, call.attempt, task, listed, tuple(sorted(answered)), tuple(held)
        )

    def ask(
        self,
        to: int,
        listing: Listing,
        answered: Collection[int],
        task: bytes = TASK,
        device: Device | None = None,
    ) -> None:
        """Ask a member, or a copy of its daemon, and note the shares that it gives."""
        question = self.question(to, listing, answered, task)
        answer = keeper.answer(device or self.group.devices[to], question)
        for (number, _), share in zip(question.listed, answer.shares, strict=True):
            if share is not None:
                kind = b"m" if number in answered else b"k"
                self.shares.setdefault((number, kind), {})[to] = share

    def look(self, corrupt: int, listing: Listing, task: bytes = TASK) -> None:
        """Open every box of a member on the server's side, both kinds."""
        agreed = [boxes.agree(self.group.devices[corrupt].box, s.box_key) for s in self.call.seats]
        ctx = self.context(listing, task)
        for number, deposit in self.deposits.items():
            reply = self.replies.get(number)
            for kind, bind, sent in (
                (b"k", self.prep + deposit.key, deposit),
                (b"m", ctx, reply),
            ):
                if sent is not None:
                    text = transcript.envelope(kind, bind, number, corrupt)
                    share = boxes.opened(agreed[number], sent.salt, text, sent.boxes[corrupt])
                    if share is not None:
                        self.shares.setdefault((number, kind), {})[corrupt] = share

    def secret(self, number: int, kind: bytes) -> bytes | None:
        """A secret, where there are shares enough."""
        return combined(self.shares.get((number, kind), {}), self.call.needed)

    def attempt_key(self, number: int) -> X25519PrivateKey | None:
        """The key of a member's pair masks, where its seed is known."""
        seed = self.secret(number, b"k")
        if seed is None:
            return None
        return X25519PrivateKey.from_private_bytes(transcript.attempt_secret(seed, self.prep))

    def unmasked(
        self,
        number: int,
        ctx: bytes,
        mask: bytes | None,
        keys: Mapping[int, X25519PrivateKey],
        listed: Iterable[tuple[int, bytes]],
    ) -> Vector:
        """A member's vector without its self mask, and the pair masks that `keys` give."""
        total = np.array(self.replies[number].vector)
        if mask is not None:
            ring.add_masks(total, [(transcript.self_key(mask, ctx, number), -1)])
        for other, public in listed:
            if other == number or not keys.keys() & {number, other}:
                continue
            own, theirs = (other, self.deposits[number].key) if other in keys else (number, public)
            shared = boxes.agree(keys[own], theirs)
            key = transcript.pair_key(shared, ctx, number, other)
            ring.add_masks(total, [(key, -1 if number < other else 1)])
        return total


def combined(shares: Mapping[int, bytes], needed: int) -> bytes | None:
    """The secret of shares, where there are enough."""
    if len(shares) < needed:
        return None
    some = sorted(shares)[:needed]
    arrays = [np.frombuffer(shares[n], np.uint8)[None] for n in some]
    return bytes(shamir.combine(shamir.row([n + 1 for n in some]), arrays)[0])


def cloned(device: Device) -> Device:
    """A daemon with the memory of another, as a restored snapshot of its machine has it."""
    clone = copy.copy(device)
    clone.accepted = copy.copy(device.accepted)
    clone.last = dict(device.last)
    return clone


def agree_with_anyone(secret: X25519PrivateKey, public: bytes) -> bytes:
    """An agreement that takes the keys which give zeros."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return bytes(32)


def refused(error: SecureSumError) -> bool:
    """Whether a refusal is one clear line."""
    return bool(str(error)) and "\n" not in str(error)
