"""The messages of secure sums, and their bytes: fields of fixed sizes, lists after their length.

What was read has the form of its message and no more: signatures, numbers and limits are checked
by who receives it.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from corolla.errors import SecureSumError
from corolla.sums.boxes import BOX
from corolla.sums.quantise import Quantiser
from corolla.sums.ring import Vector
from corolla.sums.shamir import SECRET
from corolla.sums.thresholds import LARGEST
from corolla.sums.transcript import Listed, le16, le32

T = TypeVar("T")

SALT = 16
_RUN, _KEY, _HASH, _SIGNATURE = 16, 32, 32, 64


@dataclass(frozen=True)
class Session:
    """A member's answer to a hello: the box key of its daemon, signed by its identity."""

    name: str
    box_key: bytes
    signature: bytes


@dataclass(frozen=True)
class Seat:
    """A member of an attempt: its place in the roster, and its session."""

    index: int
    box_key: bytes
    signature: bytes


@dataclass(frozen=True)
class Prepare:
    """Server → member: an attempt at the sum of a round. A member's number is its place."""

    run: bytes
    round: int
    attempt: int
    roster_sha256: bytes
    missing: int
    """How many members may be lost at each step: e."""
    quantiser: Quantiser
    seats: tuple[Seat, ...]

    def fields(self) -> list[bytes]:
        """The bytes of each field, in the order in which they are hashed and sent."""
        number = le32(self.round) + le32(self.attempt)
        seats = (le16(s.index) + s.box_key + s.signature for s in self.seats)
        head = [self.run, number, self.roster_sha256, le16(self.missing)]
        return [*head, self.quantiser.pack(), *seats]

    @property
    def needed(self) -> int:
        """Answers and shares without which nothing is opened: L - e."""
        return len(self.seats) - self.missing

    def pack(self) -> bytes:
        """The bytes of the message."""
        return le16(len(self.seats)) + b"".join(self.fields())

    @classmethod
    def unpack(cls, data: bytes) -> "Prepare":
        """The message of these bytes. Raises SecureSumError for what is none."""
        return _whole(data, "PREPARE", cls._read)

    @classmethod
    def _read(cls, read: "_Reader") -> "Prepare":
        members, run = read.count(LARGEST), read.take(_RUN)
        round, attempt, roster = read.le32(), read.le32(), read.take(_HASH)
        missing, quantiser = read.le16(), Quantiser.unpack(read.take(Quantiser.PACKED))
        seats = tuple(
            Seat(read.le16(), read.take(_KEY), read.take(_SIGNATURE)) for _ in range(members)
        )
        return cls(run, round, attempt, roster, missing, quantiser, seats)


@dataclass(frozen=True)
class Deposit:
    """Member → server: its public key of the attempt, and its secret in shares, one in each box."""

    key: bytes
    signature: bytes
    salt: bytes
    boxes: tuple[bytes, ...]

    def pack(self) -> bytes:
        """The bytes of the message."""
        return self.key + self.signature + _pack_boxes(self.salt, self.boxes)

    @classmethod
    def unpack(cls, data: bytes) -> "Deposit":
        """The message of these bytes. Raises SecureSumError for what is none."""
        return _whole(
            data,
            "DEPOSIT",
            lambda read: cls(read.take(_KEY), read.take(_SIGNATURE), *_read_boxes(read)),
        )


@dataclass(frozen=True)
class Deposited:
    """A member that has deposited, as the others are told."""

    number: int
    key: bytes
    signature: bytes


@dataclass(frozen=True)
class Listing:
    """Server → member, with the task: who has deposited, in the order of numbers."""

    run: bytes
    round: int
    attempt: int
    members: tuple[Deposited, ...]

    def pack(self) -> bytes:
        """The bytes of the message."""
        entries = (le16(m.number) + m.key + m.signature for m in self.members)
        head = self.run + le32(self.round) + le32(self.attempt)
        return head + le16(len(self.members)) + b"".join(entries)

    @classmethod
    def unpack(cls, data: bytes) -> "Listing":
        """The message of these bytes. Raises SecureSumError for what is none."""
        return _whole(data, "TRAIN", cls._read)

    @classmethod
    def _read(cls, read: "_Reader") -> "Listing":
        run, round, attempt = read.take(_RUN), read.le32(), read.le32()
        members = (
            Deposited(read.le16(), read.take(_KEY), read.take(_SIGNATURE))
            for _ in range(read.count(LARGEST))
        )
        return cls(run, round, attempt, tuple(members))


@dataclass(frozen=True)
class Masked:
    """Member → server: its masked vector, the shares of its self mask, and that mask's hash.

    It has no other field: a loss or a count in clear would be told of one member.
    """

    vector: Vector
    salt: bytes
    boxes: tuple[bytes, ...]
    commitment: bytes

    def pack(self) -> bytes:
        """The bytes of the message."""
        return (
            self.commitment
            + _pack_boxes(self.salt, self.boxes)
            + self.vector.astype("<u4", copy=False).tobytes()
        )

    @classmethod
    def unpack(cls, data: bytes, size: int) -> "Masked":
        """The message of these bytes, of a vector of `size` values.

        Raises SecureSumError for what is none.
        """

        def read(source: "_Reader") -> "Masked":
            commitment = source.take(_HASH)
            salt, boxes = _read_boxes(source)
            vector = np.frombuffer(source.take(4 * size), "<u4").astype(np.uint32)
            return cls(vector, salt, boxes, commitment)

        return _whole(data, "REPLY", read)


@dataclass(frozen=True)
class Question:
    """Server → member: whose answers are in the sum, and one box of each for this member.

    Of a member in `answered` it is a share of its self mask, of another that of its attempt's key.
    """

    run: bytes
    round: int
    attempt: int
    task: bytes
    listed: tuple[Listed, ...]
    answered: tuple[int, ...]
    boxes: tuple[tuple[bytes, bytes], ...]
    """Salt and box of each of `listed`."""

    def pack(self) -> bytes:
        """The bytes of the message."""
        head = self.run + le32(self.round) + le32(self.attempt) + self.task
        listed = b"".join(
            le16(number) + key + salt + box
            for (number, key), (salt, box) in zip(self.listed, self.boxes, strict=True)
        )
        answered = b"".join(map(le16, self.answered))
        return head + le16(len(self.listed)) + listed + le16(len(self.answered)) + answered

    @classmethod
    def unpack(cls, data: bytes) -> "Question":
        """The message of these bytes. Raises SecureSumError for what is none."""
        return _whole(data, "UNMASK", cls._read)

    @classmethod
    def _read(cls, read: "_Reader") -> "Question":
        run, round, attempt, task = read.take(_RUN), read.le32(), read.le32(), read.take(_HASH)
        entries = [
            (read.le16(), read.take(_KEY), read.take(SALT), read.take(BOX))
            for _ in range(read.count(LARGEST))
        ]
        answered = tuple(read.le16() for _ in range(read.count(LARGEST)))
        listed = tuple((number, key) for number, key, _, _ in entries)
        boxes = tuple((salt, box) for _, _, salt, box in entries)
        return cls(run, round, attempt, task, listed, answered, boxes)


@dataclass(frozen=True)
class Shares:
    """Member → server: a share for each of the members that were listed; None: cannot open."""

    shares: tuple[bytes | None, ...]

    def pack(self) -> bytes:
        """The bytes of the message."""
        flags = bytes(share is not None for share in self.shares)
        return le16(len(flags)) + flags + b"".join(share or bytes(SECRET) for share in self.shares)

    @classmethod
    def unpack(cls, data: bytes) -> "Shares":
        """The message of these bytes. Raises SecureSumError for what is none."""
        return _whole(data, "ANSWER", cls._read)

    @classmethod
    def _read(cls, read: "_Reader") -> "Shares":
        flags = read.take(read.count(LARGEST))
        if not set(flags) <= {0, 1}:
            raise SecureSumError("flags of shares are 0 or 1")
        shares = [read.take(SECRET) for _ in flags]
        return cls(tuple(s if flag else None for flag, s in zip(flags, shares, strict=True)))


class _Reader:
    """Reads fields one after another. Raises SecureSumError where there are too few bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        if self.place + size > len(self.data):
            raise SecureSumError(f"{len(self.data)} bytes are too few")
        self.place += size
        return self.data[self.place - size : self.place]

    def le16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def le32(self) -> int:
        (number,) = struct.unpack("<I", self.take(4))
        return int(number)

    def count(self, most: int) -> int:
        if (found := self.le16()) > most:
            raise SecureSumError(f"a list of {found} members, at most {most}")
        return found


def _whole(data: bytes, name: str, read: Callable[[_Reader], T]) -> T:
    """The value `read` from all the bytes; the message's name goes before what is wrong with it."""
    source = _Reader(data)
    try:
        message = read(source)
        if source.place < len(data):
            raise SecureSumError(f"{len(data)} bytes, {source.place} would do")
    except SecureSumError as error:
        raise SecureSumError(f"{name}: {error}") from error
    return message


def _pack_boxes(salt: bytes, boxes: Iterable[bytes]) -> bytes:
    every = tuple(boxes)
    return salt + le16(len(every)) + b"".join(every)


def _read_boxes(read: _Reader) -> tuple[bytes, tuple[bytes, ...]]:
    return read.take(SALT), tuple(read.take(BOX) for _ in range(read.count(LARGEST)))
