"""Twenty thousand messages with bytes changed: each is accepted or refused in one line."""

import random
from collections.abc import Callable
from dataclasses import replace

from corolla.errors import SecureSumError
from corolla.sums import keeper
from corolla.sums.device import Device
from corolla.sums.messages import Deposit, Listing, Masked, Prepare, Question, Shares
from corolla.sums.opening import Opening
from tests.corolla.sums.members import TASK, Group
from tests.corolla.sums.server import cloned

EACH = 3334
"""Of six messages: 20,004."""


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or cut off."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        at, size = draw.randrange(len(found) + 1), draw.choice([1, 2, 32, 48])
        match draw.randrange(4):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = found[at : at + size]
            case _:
                found[at : at + size] = draw.randbytes(size)
    return bytes(found)


def fresh(opening: Opening) -> Opening:
    """A copy of the server's side, whose tables are its own."""
    copy = replace(
        opening,
        deposits=dict(opening.deposits),
        replies=dict(opening.replies),
        shares=dict(opening.shares),
    )
    copy.total, copy.context = opening.total.copy(), opening.context
    return copy


def test_no_message_raises_anything_else() -> None:
    group = Group(5, values=2)
    new = group.devices[0]
    before = cloned(new)
    opening, call = group.open(group.call()), group.call()
    group.deposit(opening)
    empty = group.open(call)
    deposit = opening.deposits[0]
    prepared, asking = cloned(new), fresh(opening)
    listing = opening.announce(TASK)
    asking.announce(TASK)
    masked = group.train(opening, list(group.inputs()))[0]
    trained = cloned(new)
    opening.close()
    question = opening.question(0)
    answer = keeper.answer(cloned_with(trained), question)
    size = call.quantiser.size
    deeds: list[tuple[bytes, Callable[[bytes], object]]] = [
        (call.pack(), lambda data: cloned(before).prepare(Prepare.unpack(data))),
        (deposit.pack(), lambda data: fresh(empty).deposit(0, Deposit.unpack(data))),
        (listing.pack(), lambda data: cloned(prepared).begin(Listing.unpack(data), TASK)),
        (masked.pack(), lambda data: fresh(asking).reply(0, Masked.unpack(data, size))),
        (
            question.pack(),
            lambda data: keeper.answer(cloned_with(trained), Question.unpack(data)),
        ),
        (answer.pack(), lambda data: fresh(opening).answer(0, Shares.unpack(data))),
    ]
    for data, deed in deeds:
        draw, refused = random.Random(len(data)), 0
        deed(data)
        for _ in range(EACH):
            try:
                deed(mutated(data, draw))
            except SecureSumError as error:
                refused += 1
                assert str(error) and "\n" not in str(error)
        assert refused > EACH / 3, "most of what was changed is not what was sent"


def cloned_with(device: Device) -> Device:
    """A copy of a daemon that has spent nothing."""
    copy = cloned(device)
    copy.spent = set()
    return copy
