"""A payload sealed and opened again: what travels is what the layers below make of it."""

from typing import Any

import pytest
import torch

from corolla.errors import NotFiniteError, WireError
from corolla.types import Payload
from corolla.wire import codec, compression, messages
from corolla.wire.compression import pipeline
from corolla.wire.envelope import Envelope, Sealed, value_bytes
from corolla.wire.messages import Kind, Task

PAYLOAD: Payload = {
    "adapter": {"a": torch.arange(40.0).reshape(5, 8), "n": torch.tensor(3)},
    "scalars": {"scalars": torch.tensor([0.0, 2.0, 0.0]), "seed": torch.tensor(5)},
}
BESIDE: Payload = {"start": {"s": torch.ones(7)}, "row": {"scalars": torch.ones(2)}}
STEPS: tuple[list[str], ...] = ([], ["fp16"], ["int8", "zstd"], ["top_k:0.5"])


def task(sealed: Sealed) -> Task:
    """A task that carries it, as its receiver reads it."""
    made = Task("a" * 32, 1, "v", Kind.TRAIN, "", payload=sealed.data, scalars=sealed.scalars)
    return messages.unpack_task(messages.pack_task(made))


def same(found: Payload, wanted: Payload) -> bool:
    return found.keys() == wanted.keys() and all(
        codec.encode({"": found[group]}) == codec.encode({"": wanted[group]}) for group in wanted
    )


@pytest.mark.parametrize("steps", STEPS)
def test_what_is_sealed_is_what_the_steps_pack_and_a_message_encloses(steps: list[str]) -> None:
    sealed = Envelope(pipeline(steps)).seal(PAYLOAD, 3, beside=BESIDE)
    packed = {**pipeline(steps).pack(PAYLOAD, 3), **BESIDE}
    data, scalars = messages.enclose(packed)
    assert sealed.data == data
    assert same(sealed.scalars, scalars)
    assert sealed.size == messages.content_bytes(packed)


@pytest.mark.parametrize("steps", STEPS)
def test_an_opened_payload_has_the_sealed_form_and_what_was_beside_it(steps: list[str]) -> None:
    envelope = Envelope(pipeline(steps))
    like = envelope.like(PAYLOAD)
    blank = None if like is None else compression.blank(compression.form(like))
    found = envelope.open(task(envelope.seal(PAYLOAD, 3, beside=BESIDE)), blank)
    assert same({g: p for g, p in found.items() if g != "adapter"}, {**BESIDE, **_scalars()})
    assert compression.form(found) == compression.form({**PAYLOAD, **BESIDE})
    if steps in ([], ["fp16"]):  # whole numbers that these hold exactly
        assert same(found, {**PAYLOAD, **BESIDE})


def _scalars() -> Payload:
    return {"scalars": PAYLOAD["scalars"]}


def test_nothing_must_be_told_of_what_travels_as_it_is() -> None:
    assert Envelope().like(PAYLOAD) is None
    assert (Envelope(pipeline(["fp16"])).like(PAYLOAD) or {}).keys() == {"adapter"}


def test_what_is_left_out_of_differences_is_owed_to_the_next_payload() -> None:
    envelope, payload = Envelope(pipeline(["top_k:0.25"])), {"u": {"x": torch.arange(1.0, 9.0)}}
    first = envelope.seal(payload, owed={})
    assert first.owed["u"]["x"].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    second = envelope.seal(payload, owed=first.owed)
    sent = [envelope.open(task(own), payload)["u"]["x"] for own in (first, second)]
    assert torch.equal(sum(sent) + second.owed["u"]["x"], 2 * payload["u"]["x"])
    assert envelope.owes
    assert not Envelope(pipeline(["fp16"])).owes
    assert envelope.seal(payload).owed == {}  # no difference: the rest is 0
    assert Envelope(pipeline(["fp16"])).seal(payload, owed={}).owed == {}


@pytest.mark.parametrize("payload", [{}, {"a": {}}, {"a": {"none": torch.zeros(0, 3)}}, PAYLOAD])
def test_value_bytes_are_those_of_the_tensors_and_scalars(payload: Payload) -> None:
    sealed = Envelope().seal(payload)
    assert value_bytes(sealed.data, sealed.scalars) == messages.content_bytes(payload)


@pytest.mark.parametrize(
    ("steps", "changes", "why"),
    [
        ([], {"data": b"junk"}, "cannot be read"),
        (["fp16"], {"data": codec.encode({"adapter": PAYLOAD["adapter"]})}, "expected one content"),
        ([], {"scalars": {"adapter": PAYLOAD["scalars"]}}, "as tensors and as scalars"),
    ],
)
def test_what_was_sealed_otherwise_is_refused(
    steps: list[str], changes: dict[str, Any], why: str
) -> None:
    envelope = Envelope(pipeline(steps))
    sealed = envelope.seal(PAYLOAD)
    given = Sealed(**{"data": sealed.data, "scalars": sealed.scalars, **changes})
    with pytest.raises(WireError, match=why):
        envelope.open(task(given), {"adapter": PAYLOAD["adapter"]})


def test_a_longer_header_than_is_allowed_is_not_parsed() -> None:
    with pytest.raises(WireError, match="at most 20"):
        Envelope().open(task(Envelope().seal(PAYLOAD)), max_header=20)


def test_values_that_are_not_finite_go_through_no_lossy_step() -> None:
    odd: Payload = {"a": {"x": torch.tensor([torch.nan])}}
    with pytest.raises(NotFiniteError):
        Envelope(pipeline(["fp16"])).seal(odd)
    assert same(Envelope().open(task(Envelope().seal(odd))), odd)
