"""Attacks of a server that lies: each learns a member's vector where one defence is taken out.

An attack is a function of a group and its vectors that returns what it has learned. It runs twice:
in a build that is sabotaged, where it must succeed, and in the real one, where it must not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from corolla.errors import SecureSumError
from corolla.sums import boxes, device, keeper, ring, shamir, transcript
from corolla.sums.device import Accepted, Device
from corolla.sums.messages import Deposit, Listing, Masked, Prepare, Question, Seat
from corolla.sums.quantise import LEVELS
from corolla.sums.ring import Mask, Vector
from corolla.sums.roster import Roster
from tests.corolla.sums.members import RUN, TASK, Draws, Group
from tests.corolla.sums.server import Liar, agree_with_anyone, cloned, combined

Inputs = NDArray[np.uint32]
Attack = Callable[[Group, Inputs], Vector | None]
Sabotage = Callable[[pytest.MonkeyPatch], None]

VICTIM = 0
OTHER = bytes(range(64, 96))


def every(server: Liar) -> Listing:
    return server.listing(sorted(server.deposits))


def late(group: Group, inputs: Inputs) -> tuple[Liar, Listing]:
    """Every member has answered, and the server says to all keepers that the victim has not."""
    server = Liar.of(group)
    listing = every(server)
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    for number in server.deposits:
        server.ask(number, listing, server.replies.keys() - {VICTIM})
    return server, listing


def listed(listing: Listing) -> list[tuple[int, bytes]]:
    return [(member.number, member.key) for member in listing.members]


def call_missing(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is called missing though its vector came: its pair masks come off."""
    server, listing = late(group, inputs)
    key = server.attempt_key(VICTIM)
    assert key is not None
    return server.unmasked(VICTIM, server.context(listing), None, {VICTIM: key}, listed(listing))


def no_self_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(device, "add_masks", lambda vector, masks: ring.add_masks(vector, masks[1:]))


def open_boxes_by_attempt_key(group: Group, inputs: Inputs) -> Vector | None:
    """The attempt's key of who is called missing also opens the boxes that it has sealed."""
    server, listing = late(group, inputs)
    key = server.attempt_key(VICTIM)
    assert key is not None
    shares, ctx = {}, server.context(listing)
    for number, seat in enumerate(server.call.seats):
        shared = boxes.agree(key, seat.box_key)
        text = transcript.envelope(b"m", ctx, VICTIM, number)
        reply = server.replies[VICTIM]
        share = boxes.opened(shared, reply.salt, text, reply.boxes[number])
        if share is not None:
            shares[number] = share
    mask = combined(shares, server.call.needed)
    return server.unmasked(VICTIM, ctx, mask, {VICTIM: key}, listed(listing)) if mask else None


def boxes_from_attempt_key(patch: pytest.MonkeyPatch) -> None:
    real = Device.mask

    def mask(self: Device, vector: Vector) -> Masked:
        own = self.accepted
        assert own is not None and own.secret is not None
        secret, agreed = own.secret, own.agreed
        own.agreed = tuple(boxes.agree(secret, seat.box_key) for seat in own.call.seats)
        masked = real(self, vector)
        own.agreed = agreed
        return masked

    patch.setattr(Device, "mask", mask)


def key_of_another_round(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is not asked in one round, and called missing; in the next one it answers."""
    first = Liar.of(group, 1)
    listing = every(first)
    for number in first.deposits.keys() - {VICTIM}:
        first.train(number, inputs[number], listing)
    for number in first.deposits:
        first.ask(number, listing, first.replies.keys())
    key = first.attempt_key(VICTIM)
    assert key is not None
    second = Liar.of(group, 2)
    listing = every(second)
    for number in second.deposits:
        second.train(number, inputs[number], listing)
    for number in second.deposits:
        second.ask(number, listing, second.replies.keys())
    mask, ctx = second.secret(VICTIM, b"m"), second.context(listing)
    return second.unmasked(VICTIM, ctx, mask, {VICTIM: key}, listed(listing))


def key_not_bound(patch: pytest.MonkeyPatch) -> None:
    real = Device.prepare

    def prepare(self: Device, call: Prepare) -> Deposit:
        self.random = Draws(f"once for all {self.owner.index}")
        return real(self, call)

    patch.setattr(Device, "prepare", prepare)
    patch.setattr(
        transcript, "attempt_secret", lambda seed, prep: transcript.derive(seed, b"", "dh")
    )


def drop_neighbours(group: Group, inputs: Inputs) -> Vector | None:
    """The same lie to all: exactly the two neighbours of the victim are missing."""
    server = Liar.of(group)
    listing, near = every(server), {1, group.size - 1}
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    for number in server.deposits:
        server.ask(number, listing, server.replies.keys() - near)
    keys = {number: key for number in near if (key := server.attempt_key(number)) is not None}
    mask = server.secret(VICTIM, b"m")
    return server.unmasked(VICTIM, server.context(listing), mask, keys, listed(listing))


def sparse_graph(patch: pytest.MonkeyPatch) -> None:
    real = Device.begin

    def begin(self: Device, listing: Listing, task: bytes) -> None:
        real(self, listing, task)
        own = self.accepted
        assert own is not None
        near = {(own.number + step) % len(own.call.seats) for step in (-1, 0, 1)}
        own.listed = tuple((number, key) for number, key in own.listed if number in near)

    patch.setattr(Device, "begin", begin)


def another_cohort(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is told of few others; all others are told that these are missing."""
    server = Liar.of(group)
    corrupt = range(group.size - group.corrupt, group.size)
    told = server.listing([VICTIM, 1, 2, *corrupt])
    server.train(VICTIM, inputs[VICTIM], told)
    keys = {n: own.secret for n in corrupt if (own := group.devices[n].accepted) and own.secret}
    everyone = every(server)
    for number in server.deposits.keys() - {VICTIM}:
        server.ask(number, everyone, server.deposits.keys() - {1, 2})
    for number in corrupt:
        server.look(number, told)
    mask = server.secret(VICTIM, b"m")
    keys |= {number: key for number in (1, 2) if (key := server.attempt_key(number)) is not None}
    ctx = server.context(told)
    return server.unmasked(VICTIM, ctx, mask, keys, listed(told)) if mask else None


def self_box_without_context(patch: pytest.MonkeyPatch) -> None:
    real = transcript.envelope
    patch.setattr(
        transcript,
        "envelope",
        lambda kind, bind, i, j: real(kind, b"" if kind == b"m" else bind, i, j),
    )


def another_model(group: Group, inputs: Inputs) -> Vector | None:
    """All but the victim are sent a model for which their updates are zero."""
    server = Liar.of(group)
    listing, nothing = every(server), np.zeros_like(inputs[0])
    for number in server.deposits:
        mine = number == VICTIM
        vector, task = (inputs[number], TASK) if mine else (nothing, OTHER)
        server.train(number, vector, listing, task)
    for number in server.deposits.keys() - {VICTIM}:
        server.ask(number, listing, server.replies.keys(), OTHER)
    ctx = server.context(listing, OTHER)
    total: Vector = np.zeros_like(inputs[0])
    for number, reply in server.replies.items():
        mask = server.secret(number, b"m")
        if mask is None:
            return None
        total += reply.vector
        ring.add_masks(total, [(transcript.self_key(mask, ctx, number), -1)])
    return total


def task_not_in_context(patch: pytest.MonkeyPatch) -> None:
    real = transcript.context
    patch.setattr(transcript, "context", lambda prep, task, members: real(prep, b"", members))


def ask_restored(group: Group, inputs: Inputs) -> Vector | None:
    """Every keeper answers, is started again from a copy of its state, and answers once more."""
    server = Liar.of(group)
    listing = every(server)
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    copies = [group.restart(own) for own in group.devices]  # type: ignore[attr-defined]
    for number, own in enumerate(group.devices):
        server.ask(number, listing, server.replies.keys(), device=own)
    for number, own in enumerate(copies):
        server.ask(number, listing, server.replies.keys() - {VICTIM}, device=own)
    mask, key = server.secret(VICTIM, b"m"), server.attempt_key(VICTIM)
    assert key is not None
    return server.unmasked(VICTIM, server.context(listing), mask, {VICTIM: key}, listed(listing))


class Restarted(Group):
    """Members whose daemons come back with nothing but their disk."""

    def restart(self, own: Device) -> Device:
        return Device(own.owner, own.identity, own.spent, own.random)


def memory_on_disk(patch: pytest.MonkeyPatch) -> None:
    """The whole memory is restored, and with it the disk as it was."""

    def restart(self: Restarted, own: Device) -> Device:
        clone = cloned(own)
        clone.spent = set()
        return clone

    patch.setattr(Restarted, "restart", restart)


def sum_of_one(group: Group, inputs: Inputs) -> Vector | None:
    """All but the victim are called missing."""
    server = Liar.of(group)
    listing = every(server)
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    for number in server.deposits:
        server.ask(number, listing, {VICTIM})
    keys = {n: key for n in server.deposits if (key := server.attempt_key(n)) is not None}
    mask = server.secret(VICTIM, b"m")
    return server.unmasked(VICTIM, server.context(listing), mask, keys, listed(listing))


def few_answers_accepted(patch: pytest.MonkeyPatch) -> None:
    def checked(own: Accepted, question: Question) -> bytes:
        return transcript.context(own.prep, question.task, question.listed)

    patch.setattr(keeper, "_checked", checked)


def two_halves(group: Group, inputs: Inputs) -> Vector | None:
    """One half of the keepers is told that the victim has answered, the other that it has not."""
    server = Liar.of(group)
    listing, corrupt = every(server), group.size - 1
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    for number in range(corrupt):
        everyone = server.replies.keys()
        server.ask(number, listing, everyone if number % 2 else everyone - {VICTIM})
    server.look(corrupt, listing)
    needed = math.ceil(group.size / 2)
    seed = combined(server.shares[VICTIM, b"k"], needed)
    mask = combined(server.shares[VICTIM, b"m"], needed)
    assert seed is not None and mask is not None
    key = X25519PrivateKey.from_private_bytes(transcript.attempt_secret(seed, server.prep))
    return server.unmasked(VICTIM, server.context(listing), mask, {VICTIM: key}, listed(listing))


def half_is_enough(patch: pytest.MonkeyPatch) -> None:
    def split(self: Device, secret: bytes, call: Prepare) -> list[bytes]:
        size = len(call.seats)
        needed = math.ceil(size / 2)
        return shamir.split(secret, needed, size, self.random(32 * (needed - 1)))

    patch.setattr(Device, "_split", split)


def own_box_keys(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is given box keys of the server for those of all others."""
    keys = [X25519PrivateKey.from_private_bytes(bytes([n + 1] * 32)) for n in range(group.size)]
    call = group.call()
    seats = [
        seat if n == VICTIM else replace(seat, box_key=boxes.public(keys[n]))
        for n, seat in enumerate(call.seats)
    ]
    return through_boxes(group, inputs, replace(call, seats=tuple(seats)), keys)


def through_boxes(
    group: Group, inputs: Inputs, call: Prepare, keys: Sequence[X25519PrivateKey]
) -> Vector | None:
    """Both secrets of the victim from the boxes that `keys` open: nobody is asked."""
    victim, server = group.devices[VICTIM], Liar(group, call)
    server.deposits[VICTIM] = victim.prepare(call)
    for number in range(group.size):  # the keys of the others do not matter
        if number != VICTIM:
            sent = server.deposits[VICTIM]
            text = transcript.deposit(server.prep, boxes.public(keys[number]))
            signature = group.devices[number].identity.sign(text)
            server.deposits[number] = replace(
                sent, key=boxes.public(keys[number]), signature=signature
            )
    listing = every(server)
    server.train(VICTIM, inputs[VICTIM], listing)
    ctx, found = server.context(listing), dict[bytes, bytes]()
    for kind, bind, sent_ in (
        (b"k", server.prep + server.deposits[VICTIM].key, server.deposits[VICTIM]),
        (b"m", ctx, server.replies[VICTIM]),
    ):
        shares = {}
        for number in range(1, group.size):
            shared = boxes.agree(keys[number], call.seats[VICTIM].box_key)
            if call.seats[number].box_key == bytes(32):
                shared = bytes(32)
            text = transcript.envelope(kind, bind, VICTIM, number)
            share = boxes.opened(shared, sent_.salt, text, sent_.boxes[number])
            if share is not None:
                shares[number] = share
        secret = combined(shares, call.needed)
        if secret is None:
            return None
        found[kind] = secret
    key = X25519PrivateKey.from_private_bytes(transcript.attempt_secret(found[b"k"], server.prep))
    return server.unmasked(VICTIM, ctx, found[b"m"], {VICTIM: key}, listed(listing))


def sessions_not_signed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Roster, "check_sessions", lambda self, run, seats: None)


def own_attempt_keys(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is given keys of the server for the deposits of all others."""
    server = Liar.of(group)
    keys = {n: X25519PrivateKey.from_private_bytes(bytes([n + 1] * 32)) for n in range(1, 5)}
    told = server.listing(server.deposits, {n: boxes.public(key) for n, key in keys.items()})
    server.train(VICTIM, inputs[VICTIM], told)
    for number in server.deposits.keys() - {VICTIM}:
        server.ask(number, told, server.deposits.keys())
    mask, ctx = server.secret(VICTIM, b"m"), server.context(told)
    return server.unmasked(VICTIM, ctx, mask, keys, listed(told)) if mask else None


def deposits_not_signed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Device, "_check_listing", lambda self, own, listing: None)


def keys_of_zeros(group: Group, inputs: Inputs) -> Vector | None:
    """All others have signed box keys of zeros: who holds no key at all reads their boxes."""
    call, keys = group.call(), [X25519PrivateKey.generate() for _ in range(group.size)]
    seats = [call.seats[VICTIM]]
    for number, own in enumerate(group.devices[1:], 1):
        text = transcript.session(RUN, group.roster.sha256, f"member-{number}", bytes(32))
        seats.append(Seat(number, bytes(32), own.identity.sign(text)))
    return through_boxes(group, inputs, replace(call, seats=tuple(seats)), keys)


def zeros_agree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(boxes, "agree", agree_with_anyone)


_BITS = 10


def search_key(group: Group, inputs: Inputs) -> Vector | None:
    """The self mask of who is called missing is searched for: values of updates are small.

    The search is over the last 10 of 32 bits: the others are given, to keep this short.
    """
    server, listing = late(group, inputs)
    key, ctx = server.attempt_key(VICTIM), server.context(listing)
    assert key is not None
    half = server.unmasked(VICTIM, ctx, None, {VICTIM: key}, listed(listing))
    known = seen_masks[VICTIM] >> _BITS << _BITS
    for guess in range(1 << _BITS):
        total = half.copy()
        ring.add_masks(total, [(short_key((known | guess).to_bytes(4, "big"), ctx, VICTIM), -1)])
        if (abs(total.view(np.int32)) <= LEVELS).all():
            return total
    return None


seen_masks: dict[int, int] = {}


def short_key(mask: bytes, ctx: bytes, number: int) -> bytes:
    return transcript.derive(mask[:4], ctx, "self")


def keys_of_32_bits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transcript, "self_key", short_key)


def mask_of_another_round(group: Group, inputs: Inputs) -> Vector | None:
    """The victim is called missing in one round; the next one gives the same self mask."""
    first, listing = late(group, inputs)
    key, ctx = first.attempt_key(VICTIM), first.context(listing)
    assert key is not None
    half = first.unmasked(VICTIM, ctx, None, {VICTIM: key}, listed(listing))
    second = Liar.of(group, 2)
    listing = every(second)
    for number in second.deposits:
        second.train(number, inputs[number], listing)
    for number in second.deposits:
        second.ask(number, listing, second.replies.keys())
    mask = second.secret(VICTIM, b"m")
    assert mask is not None
    ring.add_masks(half, [(transcript.self_key(mask, ctx, VICTIM), -1)])
    return half


def mask_used_twice(patch: pytest.MonkeyPatch) -> None:
    real = Device.mask

    def mask(self: Device, vector: Vector) -> Masked:
        self.random = Draws(f"once for all {self.owner.index}")
        return real(self, vector)

    patch.setattr(Device, "mask", mask)


def two_attempts(group: Group, inputs: Inputs) -> Vector | None:
    """Two sums of one round differ by the victim alone."""
    sums = []
    for attempt, gone in enumerate([[], [VICTIM]]):
        opening = group.open(group.call(1, attempt))
        group.deposit(opening)
        group.train(opening, list(inputs), gone)
        group.answer(opening)
        sums.append(opening.open().total)
    difference: Vector = sums[0] - sums[1]
    return difference


def rounds_not_spent(patch: pytest.MonkeyPatch) -> None:
    class Never(set[tuple[bytes, int]]):
        def __contains__(self, number: object) -> bool:
            return False

    real = Device.__post_init__

    def post_init(self: Device) -> None:
        real(self)
        self.spent = Never()

    patch.setattr(Device, "__post_init__", post_init)


def both_boxes(group: Group, inputs: Inputs) -> Vector | None:
    """Two boxes under one key and nonce differ as their shares do: r ⊕ m, and m is opened."""
    server = Liar.of(group)
    listing = every(server)
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    for number in server.deposits:
        server.ask(number, listing, server.replies.keys())
    deposit, reply = server.deposits[VICTIM], server.replies[VICTIM]
    differences = {
        number: bytes(a ^ b for a, b in zip(one[:32], two[:32], strict=True))
        for number, (one, two) in enumerate(zip(deposit.boxes, reply.boxes, strict=True))
    }
    both, mask = combined(differences, server.call.needed), server.secret(VICTIM, b"m")
    assert both is not None and mask is not None
    seed = bytes(a ^ b for a, b in zip(both, mask, strict=True))
    key = X25519PrivateKey.from_private_bytes(transcript.attempt_secret(seed, server.prep))
    return server.unmasked(VICTIM, server.context(listing), mask, {VICTIM: key}, listed(listing))


def one_key_for_two_boxes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        transcript, "box_key", lambda agreed, salt, text: transcript.derive(agreed, b"", "box")
    )


def read_the_rest(group: Group, inputs: Inputs) -> Vector | None:
    """A reply is read for what it says beside its masked vector and its boxes."""
    server = Liar.of(group)
    server.train(VICTIM, inputs[VICTIM], every(server))
    sent = server.replies[VICTIM]
    plain = len(sent.commitment) + 16 + 2 + 48 * group.size + 4 * len(sent.vector)
    return np.frombuffer(sent.pack()[plain:], "<u4").astype(np.uint32)


def update_beside_the_reply(patch: pytest.MonkeyPatch) -> None:
    real = Device.mask

    class Told(Masked):
        told = b""

        def pack(self) -> bytes:
            return super().pack() + Told.told

    def mask(self: Device, vector: Vector) -> Masked:
        Told.told = vector.tobytes()
        own = real(self, vector)
        return Told(own.vector, own.salt, own.boxes, own.commitment)

    patch.setattr(Device, "mask", mask)


def plain_task(group: Group, inputs: Inputs) -> Vector | None:
    """A device that has a roster is asked for its update as it is."""
    device.refuse_plain(group.devices[VICTIM].owner, "TRAIN")
    vector: Vector = inputs[VICTIM]
    return vector


def plain_tasks_accepted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(device, "refuse_plain", lambda owner, kind: None)


def only_added(group: Group, inputs: Inputs) -> Vector | None:
    """The member with the highest number has nobody to add for: its self mask is opened."""
    server = Liar.of(group)
    listing, last = every(server), group.size - 1
    for number in server.deposits:  # the one whose vector is tried for is the last
        server.train(number, inputs[VICTIM if number == last else number], listing)
    for number in server.deposits:
        server.ask(number, listing, server.replies.keys())
    return server.unmasked(last, server.context(listing), server.secret(last, b"m"), {}, [])


def never_subtracts(patch: pytest.MonkeyPatch) -> None:
    def add_masks(vector: Vector, masks: Sequence[Mask]) -> None:
        ring.add_masks(vector, [(key, sign) for key, sign in masks if sign > 0])

    patch.setattr(device, "add_masks", add_masks)


def five() -> Group:
    return Group(5, missing=1, corrupt=1)


def ten() -> Group:
    return Group(10, missing=3, corrupt=1)


ATTACKS: dict[str, tuple[Attack, Sabotage, Callable[[], Group]]] = {
    "no self mask": (call_missing, no_self_mask, five),
    "boxes from the attempt's key": (open_boxes_by_attempt_key, boxes_from_attempt_key, five),
    "a key not bound to its attempt": (key_of_another_round, key_not_bound, five),
    "a sparse graph": (drop_neighbours, sparse_graph, ten),
    "a self box without context": (
        another_cohort,
        self_box_without_context,
        lambda: Group(7, missing=2, corrupt=2),
    ),
    "a task that is not in the context": (another_model, task_not_in_context, five),
    "a second answer from restored memory": (
        ask_restored,
        memory_on_disk,
        lambda: Restarted(5, missing=1, corrupt=1),
    ),
    "a sum of few accepted": (sum_of_one, few_answers_accepted, five),
    "half of the shares are enough": (two_halves, half_is_enough, ten),
    "sessions without signature": (own_box_keys, sessions_not_signed, five),
    "deposits without signature": (own_attempt_keys, deposits_not_signed, five),
    "agreements of zeros": (keys_of_zeros, zeros_agree, five),
    "keys of 32 bits": (search_key, keys_of_32_bits, five),
    "a mask used in two rounds": (mask_of_another_round, mask_used_twice, five),
    "rounds that are not spent": (two_attempts, rounds_not_spent, five),
    "one key for two boxes": (both_boxes, one_key_for_two_boxes, five),
    "an update beside the reply": (read_the_rest, update_beside_the_reply, five),
    "plain tasks accepted": (plain_task, plain_tasks_accepted, five),
    "masks that are only added": (only_added, never_subtracts, five),
}


def test_there_are_nineteen() -> None:
    assert len(ATTACKS) == 19


@pytest.fixture
def inputs() -> Inputs:
    """Vectors of ten members: small numbers, as updates are."""
    draw = np.random.default_rng(7)
    return draw.integers(-LEVELS, LEVELS, (10, 8)).astype(np.int32).view(np.uint32)


@pytest.fixture(autouse=True)
def masks_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notes the first 32 bits of each self mask: a search of them all would take hours."""
    real = transcript.commitment

    def commitment(ctx: bytes, number: int, mask: bytes) -> bytes:
        seen_masks[number] = int.from_bytes(mask[:4], "big")
        return real(ctx, number, mask)

    monkeypatch.setattr(transcript, "commitment", commitment)
    yield


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_succeeds_where_its_defence_is_taken_out(
    name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, sabotage, group = ATTACKS[name]
    sabotage(monkeypatch)
    found = attack(group(), inputs)
    assert found is not None and np.array_equal(found, inputs[VICTIM])


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_succeeds(name: str, inputs: Inputs) -> None:
    attack, _, group = ATTACKS[name]
    try:
        found = attack(group(), inputs)
    except SecureSumError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert found is None or not np.array_equal(found, inputs[VICTIM])


def test_a_restored_memory_is_stopped_by_the_disk(inputs: Inputs) -> None:
    """A copy of the daemon's memory beside the disk that it wrote to answers nothing."""
    server = Liar.of(five())
    listing = every(server)
    for number in server.deposits:
        server.train(number, inputs[number], listing)
    copies = [cloned(own) for own in server.group.devices]
    for number in server.deposits:
        server.ask(number, listing, server.replies.keys())
    for number, own in enumerate(copies):
        with pytest.raises(SecureSumError, match="spent"):
            server.ask(number, listing, server.replies.keys() - {VICTIM}, device=own)
