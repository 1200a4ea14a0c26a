"""A member as the keeper of others' shares: it answers one question a round, and no second one."""

from corolla.errors import SecureSumError
from corolla.sums import boxes, transcript
from corolla.sums.device import Accepted, Device
from corolla.sums.messages import Question, Shares


def answer(device: Device, question: Question) -> Shares:
    """The shares that a question asks for; the same question again gets the same answer.

    Spends the round first, then opens the boxes. Raises SecureSumError, and opens nothing, for a
    question of another attempt or context, with too few answers in the sum, or a second one.
    """
    own = device.accepted
    now = (question.run, question.round, question.attempt)
    if own is None or (own.call.run, own.call.round, own.call.attempt) != now:
        raise SecureSumError(
            f"round {question.round}, attempt {question.attempt} was not accepted here"
        )
    asked = question.pack()
    if own.answer is not None:
        if own.answer[0] != asked:
            raise SecureSumError("another question of this attempt was answered: refused")
        return own.answer[1]
    ctx = _checked(own, question)
    number = (own.call.run, own.call.round)
    if number in device.spent:
        raise SecureSumError(f"round {own.call.round} is spent: this device has answered for it")
    device.spent.add(number)
    shares = Shares(tuple(_opened(own, ctx, question)))
    own.secret, own.answer = None, (asked, shares)
    return shares


def _checked(own: Accepted, question: Question) -> bytes:
    """The context of a question. Raises SecureSumError for one that may not be answered."""
    numbers = [number for number, _ in question.listed]
    if numbers != sorted(set(numbers)) or not all(n < len(own.call.seats) for n in numbers):
        raise SecureSumError("the members of a question are not of the attempt, or not in order")
    answered = question.answered
    if list(answered) != sorted(set(answered)) or not set(answered) <= set(numbers):
        raise SecureSumError("answers of a question are not of those who have deposited")
    if len(question.boxes) != len(numbers):
        raise SecureSumError("a question has one box for each member")
    if len(answered) < own.call.needed:
        raise SecureSumError(
            f"a sum of {len(answered)} answers, at least {own.call.needed} are needed: refused"
        )
    ctx = transcript.context(own.prep, question.task, question.listed)
    if own.context is not None and own.context != ctx:
        raise SecureSumError("the question is of another task, or of others who have deposited")
    return ctx


def _opened(own: Accepted, ctx: bytes, question: Question) -> list[bytes | None]:
    """The share in each box; None where a box does not open."""
    answered, found = set(question.answered), list[bytes | None]()
    for (sender, key), (salt, box) in zip(question.listed, question.boxes, strict=True):
        kind, bind = (b"m", ctx) if sender in answered else (b"k", own.prep + key)
        text = transcript.envelope(kind, bind, sender, own.number)
        found.append(boxes.opened(own.agreed[sender], salt, text, box))
    return found
