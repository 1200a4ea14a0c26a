import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla import codec, wire
from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.server.aggregate import in_order, read_reply
from corolla.types import Params, Payload
from corolla.wire import Kind, Packet, Reply, Task, pack_reply

TASK = Task("ab" * 16, 3, "v3", Kind.TRAIN, "{}")
A, B = torch.arange(12.0).reshape(4, 3), torch.ones(2, 4)
LIKE: Payload = {"adapter": {"x.lora_A": A, "x.lora_B": B}, "head": {}}


def reply(payload: Payload | bytes = LIKE, **changes: Any) -> Packet:
    data = payload if isinstance(payload, bytes) else codec.encode(payload)
    honest = Reply(TASK.run_id, TASK.round, TASK.base_version, TASK.kind, "ada", 5, {}, data)
    return pack_reply(replace(honest, **changes))


def adapter(**tensors: torch.Tensor) -> Payload:
    names = {"a": "x.lora_A", "b": "x.lora_B"}
    return {"adapter": {names.get(n, n): t for n, t in tensors.items()}, "head": {}}


def nan(value: float) -> torch.Tensor:
    poisoned = A.clone()
    poisoned[2, 1] = value
    return poisoned


def test_an_honest_reply_passes() -> None:
    found, payload = read_reply(reply(metrics={"loss": 2.0}), "ada", TASK, LIKE)
    assert (found.num_examples, found.metrics) == (5, {"loss": 2.0})
    assert torch.equal(payload["adapter"]["x.lora_A"], A)
    assert torch.equal(payload["adapter"]["x.lora_B"], B)


def test_the_order_of_tensors_does_not_matter() -> None:
    turned: Payload = {"head": {}, "adapter": dict(reversed(list(LIKE["adapter"].items())))}
    _, payload = read_reply(reply(turned), "ada", TASK, LIKE)
    assert torch.equal(payload["adapter"]["x.lora_A"], A)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (adapter(a=nan(math.nan), b=B), "not finite"),
        (adapter(a=nan(math.inf), b=B), "not finite"),
        (adapter(a=nan(-math.inf), b=B), "not finite"),
        (adapter(a=A.T, b=B), "expected"),
        (adapter(a=A[:1], b=B), "expected"),
        (adapter(a=A[:, :1], b=B), "expected"),
        (adapter(a=torch.tensor(1.0), b=B), "expected"),
        (adapter(a=A[None], b=B), "expected"),
        (adapter(a=A[:0], b=B), "expected"),
        (adapter(a=A.half(), b=B), "float16"),
        (adapter(a=A.bfloat16(), b=B), "bfloat16"),
        (adapter(a=A.double(), b=B), "float64"),
        (adapter(a=A.char(), b=B), "int8"),
        (adapter(a=A.int(), b=B), "int32"),
        (adapter(a=A.to(torch.complex64), b=B), "complex64"),
        (adapter(a=A.bool(), b=B), "bool"),
        (adapter(a=A), "1 tensors"),
        (adapter(b=B), "1 tensors"),
        (adapter(a=A, b=B, extra=B.clone()), "'extra'"),
        (adapter(a=A, renamed=B), "2 tensors"),
        ({"adapter": LIKE["adapter"]}, "groups"),
        ({**LIKE, "more": {}}, "groups"),
        ({"other": LIKE["adapter"], "head": {}}, "groups"),
        ({"adapter": LIKE["adapter"], "head": {"w": A.clone()}}, "'head'"),
        ({}, "groups"),
        (b"", "groups"),
        (codec.encode(LIKE)[:-1], "cannot be read"),
        (b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.", "cannot"),
    ],
)
def test_a_payload_that_is_not_as_declared_is_refused(
    payload: Payload | bytes, reason: str
) -> None:
    with pytest.raises(WireError, match=reason):
        read_reply(reply(payload), "ada", TASK, LIKE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_examples": 0}, "no examples"),
        ({"num_examples": 2**40 + 1}, "examples"),
        ({"run_id": "cd" * 16}, "another run"),
        ({"run_id": ""}, "another run"),
        ({"client": "ben"}, "another run, task or client"),
        ({"client": ""}, "client"),
        ({"client": "Ada"}, "client"),
        ({"kind": Kind.EVALUATE}, "another run, task"),
        ({"kind": Kind.HELLO}, "another run, task"),
        ({"round": 2}, "stale"),
        ({"round": 4}, "stale"),
        ({"base_version": "v2"}, "stale"),
        ({"base_version": ""}, "stale"),
    ],
)
def test_a_reply_to_something_else_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        read_reply(reply(**changes), "ada", TASK, LIKE)


def test_an_error_reply_carries_no_update() -> None:
    """Also one that sends a payload along."""
    found, payload = read_reply(reply(error="out of memory"), "ada", TASK, LIKE)
    assert (found.error, payload) == ("out of memory", {})
    found, payload = read_reply(reply(missing=["A"], error="x"), "ada", TASK, LIKE)
    assert (list(found.missing), payload) == (["A"], {})


def test_a_payload_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    big = reply(b"\xff" * ((1 << 20) + 200))
    with pytest.raises(WireError, match="at most"):
        read_reply(big, "ada", TASK, LIKE)
    large: Payload = {"adapter": {"w": torch.zeros(1 << 20)}}
    with pytest.raises(WireError, match=f"at most {(5 << 20) + (1 << 20)}"):
        read_reply(reply(b"\xff" * (7 << 20)), "ada", TASK, large)


# Scalar groups, which travel in the header

G = torch.tensor([0.5, -2.0, 0.0])
SCALARS: Params = {
    "scalars": G,
    "step": torch.tensor(-0.1),
    "directions": torch.tensor([7, 0, 7], dtype=torch.int32),
}
LIKE_SCALARS: Payload = {
    "scalars": {
        "scalars": torch.zeros(3),
        "step": torch.tensor(-0.1),
        "directions": torch.full((3,), 7, dtype=torch.int32),
    }
}
LIKE_SEEDED: Payload = {
    "scalars": {
        "scalars": torch.zeros(3, dtype=torch.float16),
        "step": torch.tensor(1.0),
        "seed": torch.tensor(5),
    }
}


def answer(payload: Payload) -> Packet:
    """A reply as a client packs it."""
    dense, scalars = wire.enclose(payload)
    return reply(dense, scalars=scalars)


def test_an_honest_reply_of_scalars_passes() -> None:
    found, payload = read_reply(answer({"scalars": SCALARS}), "ada", TASK, LIKE_SCALARS)
    assert found.num_examples == 5
    assert payload.keys() == {"scalars"}
    assert payload["scalars"].keys() == SCALARS.keys()
    assert all(torch.equal(payload["scalars"][n], t) for n, t in SCALARS.items())


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_the_seed_is_the_one_that_the_client_was_given(seed: int) -> None:
    """A client that chose its own directions could undo what others learnt."""
    own = torch.tensor(seed)
    like: Payload = {"scalars": {**LIKE_SEEDED["scalars"], "seed": own}}
    honest = {"scalars": G.half(), "step": torch.tensor(1.0), "seed": own}
    _, payload = read_reply(answer({"scalars": honest}), "ada", TASK, like)
    assert payload["scalars"]["seed"].item() == seed
    other = {**honest, "seed": own + (-1 if seed else 1)}
    with pytest.raises(WireError, match=r"update has seed .* in 'scalars', not"):
        read_reply(answer({"scalars": other}), "ada", TASK, like)


@pytest.mark.parametrize("factor", [1.0, 1 + 2e-7, 1 - 5e-6])
def test_a_step_may_differ_by_the_rounding_of_another_machine(factor: float) -> None:
    step = torch.tensor(-0.1 * factor)
    sent: Payload = {"scalars": {**SCALARS, "step": step}}
    _, payload = read_reply(answer(sent), "ada", TASK, LIKE_SCALARS)
    assert float(payload["scalars"]["step"]) == float(step)  # as it was sent


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, 0.999, 10.0, 1e6])
def test_the_step_is_the_one_of_the_schedule(factor: float) -> None:
    """A larger one would be a larger weight."""
    step = torch.tensor(-0.1 * factor)
    with pytest.raises(WireError, match=r"update has step .* in 'scalars', not -0.1"):
        read_reply(answer({"scalars": {**SCALARS, "step": step}}), "ada", TASK, LIKE_SCALARS)


def test_scalars_beside_tensors_pass() -> None:
    like: Payload = {**LIKE, **LIKE_SCALARS}
    _, payload = read_reply(answer({**LIKE, "scalars": SCALARS}), "ada", TASK, like)
    assert payload.keys() == like.keys()


def without(name: str) -> Params:
    return {n: t for n, t in SCALARS.items() if n != name}


def directed(*directions: int) -> Params:
    return {**SCALARS, "directions": torch.tensor(directions, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"scalars": {**SCALARS, "scalars": G * math.nan}}, "not finite"),
        ({"scalars": {**SCALARS, "scalars": torch.tensor([0.0, math.inf, 1.0])}}, "not finite"),
        ({"scalars": {**SCALARS, "scalars": torch.tensor([0.0, 2e6, 1.0])}}, r"beyond 1e\+06"),
        ({"scalars": {**SCALARS, "scalars": G.half()}}, "float16"),
        ({"scalars": {**directed(1, 2), "scalars": G[:2]}}, r"\(2,\), expected .* \(3,\)"),
        ({"scalars": {**directed(1, 2, 3, 4), "scalars": torch.ones(4)}}, r"\(4,\), expected"),
        ({"scalars": {**directed(), "scalars": G[:0]}}, r"\(0,\), expected"),
        ({"scalars": directed(0, 8, 1)}, "'directions' of 'scalars' is not between 0 and 7"),
        ({"scalars": directed(0, 65535, 1)}, "not between 0 and 7"),
        ({"scalars": without("directions")}, "1 tensors of 'scalars', first 'directions'"),
        ({"scalars": without("step")}, "first 'step'"),
        ({"scalars": {**SCALARS, "seed": torch.tensor(3)}}, "first 'seed'"),
        ({"scalars": SCALARS, "more": SCALARS}, "groups"),
        ({"other": SCALARS}, "groups"),
        ({}, "groups"),
        ({"scalars": {"x": G}}, "4 tensors of 'scalars'"),
    ],
)
def test_scalars_that_are_not_as_declared_are_refused(payload: Payload, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        read_reply(answer(payload), "ada", TASK, LIKE_SCALARS)


@pytest.mark.parametrize("like", [LIKE, LIKE_SCALARS])
def test_a_group_cannot_come_twice(like: Payload) -> None:
    """As tensors in the payload and as scalars in the header."""
    (name, *_) = like
    twice = reply(codec.encode({name: {"x": G}}), scalars={name: SCALARS})
    with pytest.raises(WireError, match=f"group '{name}' is there as tensors and as scalars"):
        read_reply(twice, "ada", TASK, like)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fp32", b"\x00" * 8),
        ("fp32", b"\x00" * 13),
        ("fixed32", b"\xff" * 12),
        ("fixed32", b"\x00" * 8),
        ("bitmap", b"\xff"),
        ("varint", b"\x80\x80\x80"),
        ("size", 1 << 31),
        ("step", math.nan),
        ("step", math.inf),
    ],
)
def test_a_header_that_no_sender_writes_is_refused(field: str, value: object) -> None:
    head = pb.Reply()
    honest = answer({"scalars": SCALARS})
    head.ParseFromString(honest.header)
    setattr(head.scalars[0], field, value)
    with pytest.raises(WireError):
        read_reply(Packet(head.SerializeToString(), b""), "ada", TASK, LIKE_SCALARS)


def test_where_no_payload_is_expected_none_is_read() -> None:
    _, payload = read_reply(reply(b"junk"), "ada", TASK, None)
    assert payload == {}


HONEST = reply(metrics={"train_loss": 1.0})


@given(
    st.sets(st.integers(0, 8 * len(HONEST.header) - 1), max_size=3),
    st.sets(st.integers(0, 8 * len(HONEST.payload) - 1), max_size=3),
    st.integers(0, 20),
)
def test_a_damaged_reply_is_refused_or_harmless(head: set[int], body: set[int], cut: int) -> None:
    header, payload = bytearray(HONEST.header), bytearray(HONEST.payload)
    for data, bits in ((header, head), (payload, body)):
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
    damaged = Packet(bytes(header), bytes(payload[: len(payload) - cut]))
    try:
        found, update = read_reply(damaged, "ada", TASK, LIKE)
    except WireError:
        return
    if update:
        assert torch.equal(update["adapter"]["x.lora_A"], A)
        assert 1 <= found.num_examples <= 2**40
    else:
        assert found.error or found.missing


P = {name: Packet(name.encode(), b"") for name in "abcdef"}


@given(st.permutations("abcde"))
def test_answers_come_in_the_order_of_clients(arrival: Sequence[str]) -> None:
    found = list(in_order([(c, P[c]) for c in arrival], "abcde"))
    assert found == [(c, P[c]) for c in "abcde"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef?"), st.sampled_from([*P.values(), None])), max_size=12
    )
)
def test_everybody_is_answered_for_exactly_once(
    answers: list[tuple[str, Packet | None]],
) -> None:
    """Duplicates, strangers and silence: the first answer of each counts."""
    members = "bcde"
    found = list(in_order(answers, members))
    first: dict[str, Packet | None] = {}
    for client, packet in answers:
        first.setdefault(client, packet)
    assert found == [(c, first.get(c)) for c in members]


def test_answers_are_passed_on_as_soon_as_they_can_be() -> None:
    """So that an aggregate is summed in the memory of few updates, not of all."""
    asked: list[str] = []

    def arriving() -> Iterator[tuple[str, Packet | None]]:
        for client in "abdc":
            asked.append(client)
            yield client, P[client]

    answers = in_order(arriving(), "abcd")
    assert (next(answers)[0], asked) == ("a", ["a"])
    assert (next(answers)[0], asked) == ("b", ["a", "b"])
    assert (next(answers)[0], asked) == ("c", ["a", "b", "d", "c"])
    assert [client for client, _ in answers] == ["d"]


def test_a_thousand_clients_in_reverse_order() -> None:
    members = [f"{i:04d}" for i in range(1000)]
    answers = [(c, P["a"]) for c in reversed(members)]
    assert [client for client, _ in in_order(answers, members)] == members
