"""Members of secure sums and their server in one process, for the tests of this folder."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from corolla.sums import keeper
from corolla.sums.device import Device, Owner
from corolla.sums.messages import Masked, Prepare
from corolla.sums.opening import Opened, Opening
from corolla.sums.quantise import Quantiser
from corolla.sums.ring import Vector
from corolla.sums.roster import Roster

RUN = bytes(range(16))
TASK = bytes(range(32, 64))


class Draws:
    """Random bytes of a test, the same each time: SHAKE-256 of a name and a count."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(f"{self.name} {self.count}".encode()).digest(size)


@dataclass
class Group:
    """A roster of members, all of one sum, with devices that a test may replace."""

    size: int
    missing: int = 1
    corrupt: int = 1
    values: int = 4
    smallest: int = 1
    seed: str = "members"
    device: Callable[..., Device] = Device
    opening: Callable[..., Opening] = Opening
    devices: list[Device] = field(default_factory=list)

    def __post_init__(self) -> None:
        draws = [Draws(f"{self.seed} {i}") for i in range(self.size)]
        keys = [Ed25519PrivateKey.from_private_bytes(draw(32)) for draw in draws]
        entries = [
            (f"member-{i}", key.public_key().public_bytes_raw()) for i, key in enumerate(keys)
        ]
        self.roster, self.quantiser = Roster(tuple(entries)), Quantiser(1.0, 1, self.values)
        self.devices = [
            self.device(Owner(self.roster, i, self.smallest, self.corrupt), key, set(), draw)
            for i, (key, draw) in enumerate(zip(keys, draws, strict=True))
        ]

    def call(self, round: int = 1, attempt: int = 0, who: Sequence[int] | None = None) -> Prepare:
        """An attempt with the sessions of these members, or of all."""
        who = range(self.size) if who is None else who
        seats = [self.roster.seat(RUN, i, self.devices[i].session(RUN)) for i in who]
        return Prepare(
            RUN, round, attempt, self.roster.sha256, self.missing, self.quantiser, tuple(seats)
        )

    def inputs(self, seed: int = 0) -> NDArray[np.uint32]:
        """A vector of each member, of any 32-bit numbers."""
        draw = np.random.default_rng(seed)
        return draw.integers(0, 2**32, (self.size, self.quantiser.size), np.uint32)

    def open(self, call: Prepare) -> Opening:
        """The server's side of an attempt."""
        return self.opening(call, self.roster, self.corrupt)

    def deposit(self, opening: Opening, without: Collection[int] = ()) -> None:
        """Every member deposits, but those that are lost."""
        for number, seat in enumerate(opening.call.seats):
            if number not in without:
                opening.deposit(number, self.devices[seat.index].prepare(opening.call))

    def train(
        self,
        opening: Opening,
        inputs: Sequence[Vector],
        without: Collection[int] = (),
        task: bytes = TASK,
    ) -> dict[int, Masked]:
        """Every member that has deposited masks its vector, but those that are lost."""
        listing, replies = opening.announce(task), dict[int, Masked]()
        for member in listing.members:
            if member.number not in without:
                device = self.devices[opening.call.seats[member.number].index]
                device.begin(listing, task)
                replies[member.number] = device.mask(inputs[member.number])
                opening.reply(member.number, replies[member.number])
        return replies

    def answer(self, opening: Opening, without: Collection[int] = ()) -> None:
        """Every member that has accepted the attempt answers, but those that are lost."""
        opening.close()
        for number, seat in enumerate(opening.call.seats):
            device = self.devices[seat.index]
            if number not in without and device.accepted and device.accepted.prep == opening.prep:
                opening.answer(number, keeper.answer(device, opening.question(number)))

    def sum(
        self,
        inputs: Sequence[Vector],
        no_deposit: Collection[int] = (),
        no_reply: Collection[int] = (),
        no_answer: Collection[int] = (),
    ) -> Opened:
        """One attempt from beginning to end."""
        opening = self.open(self.call())
        self.deposit(opening, no_deposit)
        self.train(opening, inputs, no_reply)
        self.answer(opening, no_answer)
        return opening.open()
