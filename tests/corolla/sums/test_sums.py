"""Sums are exact whoever is lost, or they are refused; who deals or answers badly is named."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.errors import SecureSumError
from corolla.sums import keeper, shamir, transcript
from corolla.sums.device import Device
from corolla.sums.messages import Prepare, Shares
from corolla.sums.opening import Opening
from tests.corolla.sums.members import RUN, TASK, Draws, Group

SIZES = [(5, 1), (10, 3)]


def lost_before_deposit(group: Group, lost: set[int]) -> tuple[Opening, set[int]]:
    opening = group.open(group.call())
    group.deposit(opening, lost)
    group.train(opening, list(group.inputs()))
    group.answer(opening)
    return opening, lost


def lost_before_training(group: Group, lost: set[int]) -> tuple[Opening, set[int]]:
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()), lost)
    group.answer(opening, lost)
    return opening, lost


def lost_after_reply(group: Group, lost: set[int]) -> tuple[Opening, set[int]]:
    """Their vectors are in the sum: their keys are not needed, their answers are missing."""
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()))
    group.answer(opening, lost)
    return opening, set()


def silent_at_the_question(group: Group, lost: set[int]) -> tuple[Opening, set[int]]:
    """They come back to the question without having trained, and some others do not."""
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()), lost)
    group.answer(opening, range(group.size - len(lost), group.size))
    return opening, lost


def replies_too_late(group: Group, lost: set[int]) -> tuple[Opening, set[int]]:
    """Their vectors come when the sum is closed: they are dropped, and stay masked."""
    opening, inputs = group.open(group.call()), group.inputs()
    group.deposit(opening)
    group.train(opening, list(inputs), lost)
    group.answer(opening, lost)
    listing = opening.announce(TASK)
    for number in lost:
        group.devices[number].begin(listing, TASK)
        with pytest.raises(SecureSumError, match="late"):
            opening.reply(number, group.devices[number].mask(inputs[number]))
    return opening, lost


POINTS = [
    lost_before_deposit,
    lost_before_training,
    lost_after_reply,
    silent_at_the_question,
    replies_too_late,
]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("size", "missing"), SIZES)
def test_the_sum_is_exact_with_as_many_lost_as_may_be(
    point: Callable[[Group, set[int]], tuple[Opening, set[int]]], size: int, missing: int
) -> None:
    for number in range(missing + 1):
        group = Group(size, missing)
        opening, gone = point(group, set(range(1, 1 + number)))
        there = sorted(set(range(size)) - gone)
        opened = opening.open()
        assert opened.members == tuple(there)
        assert np.array_equal(opened.total, group.inputs()[there].sum(0, dtype=np.uint32))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("size", "missing"), SIZES)
def test_one_more_is_refused(
    point: Callable[[Group, set[int]], tuple[Opening, set[int]]], size: int, missing: int
) -> None:
    group = Group(size, missing)
    with pytest.raises(SecureSumError, match=f"{size - missing} are needed") as caught:
        point(group, set(range(1, 2 + missing)))[0].open()
    assert caught.value.again == (point is not lost_after_reply)


def test_another_attempt_may_follow_what_was_not_opened() -> None:
    group = Group(5)
    opening = group.open(group.call(1, 0))
    group.deposit(opening, {0, 1})
    with pytest.raises(SecureSumError, match="deposited") as caught:
        opening.announce(TASK)
    assert caught.value.again
    second, inputs = group.open(group.call(1, 1)), group.inputs()
    group.deposit(second)
    group.train(second, list(inputs))
    group.answer(second)
    assert np.array_equal(second.open().total, inputs.sum(0, dtype=np.uint32))


def test_a_restarted_daemon_is_a_member_that_is_missing() -> None:
    group, inputs = Group(5), Group(5).inputs()
    opening = group.open(group.call())
    group.deposit(opening)
    old = group.devices[2]
    group.devices[2] = Device(old.owner, old.identity, old.spent, Draws("again"))
    group.train(opening, list(inputs), {2})
    group.answer(opening)
    with pytest.raises(SecureSumError, match="not accepted here"):
        keeper.answer(group.devices[2], opening.question(2))
    there = [0, 1, 3, 4]
    assert np.array_equal(opening.open().total, inputs[there].sum(0, dtype=np.uint32))


def test_asked_again_a_member_sends_the_same_bytes() -> None:
    group, call = Group(5), Group(5).call()
    device = group.devices[0]
    assert device.prepare(call) is device.prepare(call)
    for other in (replace(call, missing=0), replace(call, attempt=0, round=0)):
        with pytest.raises(SecureSumError, match="not after the last"):
            device.prepare(other)


def test_an_answer_is_given_once() -> None:
    group = Group(5)
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()))
    opening.close()
    question = opening.question(1)
    first = keeper.answer(group.devices[1], question)
    assert keeper.answer(group.devices[1], question) is first
    other = replace(question, answered=question.answered[1:], boxes=question.boxes)
    with pytest.raises(SecureSumError, match="another question"):
        keeper.answer(group.devices[1], other)
    with pytest.raises(SecureSumError, match="spent"):
        group.devices[1].prepare(group.call(1, 1))
    with pytest.raises(SecureSumError, match="second task"):
        group.devices[1].begin(opening.announce(TASK), TASK)


def test_a_member_masks_once() -> None:
    group = Group(5)
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()))
    with pytest.raises(SecureSumError, match="answered"):
        group.devices[0].mask(group.inputs()[0])


class BadDealer(Device):
    """A member whose deposit has boxes with shares of nothing."""

    def _split(self, secret: bytes, call: Prepare) -> list[bytes]:
        if self.owner.index != 3:
            return super()._split(secret, call)
        return [self.random(32) for _ in call.seats]


class ClosedBoxes(Device):
    """A member whose boxes do not open."""

    def _split(self, secret: bytes, call: Prepare) -> list[bytes]:
        shares = super()._split(secret, call)
        if self.owner.index == 3 and self.accepted is not None:
            self.accepted.agreed = tuple(bytes(32) for _ in call.seats)
        return shares


@pytest.mark.parametrize(
    ("kind", "gone"), [(BadDealer, set[int]()), (BadDealer, {3}), (ClosedBoxes, set[int]())]
)
def test_a_bad_dealer_is_named(kind: type[Device], gone: set[int]) -> None:
    group = Group(7, missing=2, device=kind)
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()), gone)
    group.answer(opening)
    with pytest.raises(SecureSumError, match="member-3 dealt") as caught:
        opening.open()
    assert caught.value.named == (3,) and not caught.value.again


@pytest.mark.parametrize("spoil", ["wrong", "closed", "one"])
def test_a_bad_answer_of_one_keeper_is_survived(spoil: str) -> None:
    group, inputs = Group(7, missing=2, corrupt=1), Group(7).inputs()
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(inputs))
    group.answer(opening)
    own = opening.shares[2].shares
    bad = {
        "wrong": tuple(bytes(32) for _ in own),
        "closed": (None,) * 7,
        "one": (own[0], bytes(32), *own[2:]),
    }[spoil]
    opening.shares[2] = Shares(bad)
    opened = opening.open()
    assert opened.wrong == (2,)
    assert np.array_equal(opened.total, inputs.sum(0, dtype=np.uint32))


def test_of_two_bad_answers_nobody_is_named() -> None:
    group = Group(7, missing=2)
    opening = group.open(group.call())
    group.deposit(opening)
    group.train(opening, list(group.inputs()))
    group.answer(opening)
    for number in (2, 3):
        opening.shares[number] = Shares(tuple(bytes([n + 1]) * 32 for n in range(7)))
    with pytest.raises(SecureSumError, match="nobody can be named") as caught:
        opening.open()
    assert not caught.value.named


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_shares_of_the_threshold_give_the_secret(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    threshold = data.draw(st.integers(1, size))
    points = data.draw(st.permutations(range(1, size + 1)))[:threshold]
    draw = Draws(f"{size} {threshold}")
    secret = draw(32)
    shares = shamir.split(secret, threshold, size, draw(32 * (threshold - 1)))
    arrays = [np.frombuffer(shares[point - 1], np.uint8)[None] for point in points]
    assert shamir.combine(shamir.row(points), arrays)[0].tobytes() == secret


def test_one_share_less_says_nothing() -> None:
    """For two shares of three there is exactly one polynomial for every secret."""
    secrets = set()
    for first in range(256):
        coefficients = [
            (a, b)
            for a in range(256)
            for b in [_times(_times(a, 1) ^ first ^ 17, 1)]
            if _value(first, a, b, 1) == 17 and _value(first, a, b, 2) == 99
        ]
        assert len(coefficients) == 1
        secrets.add(first)
    assert len(secrets) == 256


def _times(a: int, b: int) -> int:
    return int(shamir._PRODUCTS[a, b])


def _value(secret: int, a: int, b: int, x: int) -> int:
    return secret ^ _times(a, x) ^ _times(b, _times(x, x))


def test_the_server_refuses_what_is_no_deposit() -> None:
    group, other = Group(5), Group(5, seed="others")
    opening = group.open(group.call())
    with pytest.raises(SecureSumError, match="not signed"):
        opening.deposit(0, other.devices[0].prepare(other.call()))
    deposit = group.devices[0].prepare(opening.call)
    with pytest.raises(SecureSumError, match="one box for each"):
        opening.deposit(0, replace(deposit, boxes=deposit.boxes[1:]))
    with pytest.raises(SecureSumError, match="not of the attempt"):
        opening.deposit(9, deposit)
    opening.deposit(0, deposit)
    with pytest.raises(SecureSumError, match="twice"):
        opening.deposit(0, deposit)


def test_a_key_that_nobody_could_use_is_refused_at_once() -> None:
    """Else one corrupt member would stop all others, and could not be named."""
    group = Group(5)
    opening, own = group.open(group.call()), group.devices[3]
    deposit = own.prepare(opening.call)
    signature = own.identity.sign(transcript.deposit(opening.prep, bytes(32)))
    with pytest.raises(SecureSumError, match="zeros"):
        opening.deposit(3, replace(deposit, key=bytes(32), signature=signature))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda call, group: replace(call, roster_sha256=bytes(32)), "roster is another one"),
        (lambda call, group: replace(call, missing=2), "twice as many"),
        (lambda call, group: replace(call, seats=call.seats[1:]), "not a member"),
        (lambda call, group: replace(call, seats=call.seats[::-1]), "not after"),
        (lambda call, group: replace(call, round=0), "not after"),
        (lambda call, group: replace(call, run=bytes(16)), "not signed"),
    ],
)
def test_attempts_are_refused(change: Callable[[Prepare, Group], Prepare], why: str) -> None:
    group = Group(5)
    with pytest.raises(SecureSumError, match=why):
        group.devices[0].prepare(change(group.call(), group))


def test_a_device_holds_to_its_smallest_sum() -> None:
    """A cohort that the server picks is judged by how many of the whole roster may be corrupt."""
    group = Group(10, missing=3, corrupt=1, smallest=5)
    group.devices[0].prepare(group.call())
    few = replace(group.call(1, 1, range(6)), missing=2)
    with pytest.raises(SecureSumError, match=r"smallest-sum=5"):
        group.devices[0].prepare(few)
    assert group.devices[0].session(RUN).name == "member-0"
