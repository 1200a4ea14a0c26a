import json
import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import zstandard
from torch import Tensor

from corolla.aggregation.sums import summed_like
from corolla.proto import update_pb2 as pb
from corolla.server.rounds.gate import judge, most_bytes
from corolla.server.rounds.verdicts import Code, Expected, Judged, Verdict
from corolla.types import Params, Payload
from corolla.wire import codec, limits, messages
from corolla.wire.compression import pipeline
from corolla.wire.messages import Kind, Reply, Task, pack_bundle, pack_reply
from corolla.wire.packet import Packet
from experiments.bench.zeroth_order import peak, resident, restart_peak

TASK = Task("ab" * 16, 3, "v3", Kind.TRAIN, "{}")
A, B = torch.arange(12.0).reshape(4, 3), torch.ones(2, 4)
LIKE: Payload = {"adapter": {"x.lora_A": A, "x.lora_B": B}, "head": {}}
EXPECT = Expected(LIKE, most_examples=9)


def reply(payload: Payload | bytes = LIKE, **changes: Any) -> Packet:
    data = payload if isinstance(payload, bytes) else codec.encode(payload)
    honest = Reply(TASK.run_id, TASK.round, TASK.base_version, TASK.kind, "ada", 5, {}, data)
    return pack_reply(replace(honest, **changes))


def header(packet: Packet, **fields: Any) -> Packet:
    """With fields that no sender writes."""
    head = pb.Reply.FromString(packet.header)
    for name, value in fields.items():
        setattr(head, name, value)
    return Packet(head.SerializeToString(), packet.payload)


def adapter(**tensors: Tensor) -> Payload:
    names = {"a": "x.lora_A", "b": "x.lora_B"}
    return {"adapter": {names.get(n, n): t for n, t in tensors.items()}, "head": {}}


def one(value: float) -> Tensor:
    poisoned = A.clone()
    poisoned[2, 1] = value
    return poisoned


def accepted(packet: Packet | None, expect: Expected = EXPECT, task: Task = TASK) -> Judged:
    judged = judge(packet, "ada", task, expect)
    assert judged.verdict == Verdict(Code.ACCEPTED)
    assert judged.reply is not None
    return judged


def refused(
    packet: Packet | None, code: Code, why: str = "", expect: Expected = EXPECT, task: Task = TASK
) -> None:
    judged = judge(packet, "ada", task, expect)
    assert (judged.verdict.code, why in judged.verdict.why) == (code, True), judged.verdict
    assert (judged.reply, judged.update, judged.content) == (None, {}, 0)
    assert judged.verdict.why
    assert judged.verdict.why.isprintable()
    assert len(judged.verdict.why) <= 300


# What passes


def test_an_honest_reply_passes() -> None:
    judged = accepted(reply(metrics={"loss": 2.0}))
    assert judged.reply is not None
    assert (judged.reply.num_examples, judged.reply.metrics) == (5, {"loss": 2.0})
    assert torch.equal(judged.update["adapter"]["x.lora_A"], A)
    assert torch.equal(judged.update["adapter"]["x.lora_B"], B)
    assert judged.content == 4 * 12 + 4 * 8


def test_the_order_of_tensors_does_not_matter() -> None:
    turned: Payload = {"head": {}, "adapter": dict(reversed(list(LIKE["adapter"].items())))}
    assert torch.equal(accepted(reply(turned)).update["adapter"]["x.lora_A"], A)


def test_an_update_of_nothing_but_zeros_is_legal() -> None:
    zero = {"adapter": {n: t * 0 for n, t in LIKE["adapter"].items()}, "head": {}}
    accepted(reply(zero), replace(EXPECT, max_norm=1e-9))


def test_bf16_travels_as_its_own_bytes() -> None:
    """Which numpy does not have: nothing on the way may turn it into another type."""
    like: Payload = {"adapter": {"w": torch.tensor([1.0, -0.1, 3e38]).bfloat16() * 1e-33}}
    judged = accepted(reply(like), Expected(like))
    assert judged.update["adapter"]["w"].dtype == torch.bfloat16
    assert torch.equal(
        judged.update["adapter"]["w"].view(torch.int16), like["adapter"]["w"].view(torch.int16)
    )
    assert judged.content == 2 * 3


@pytest.mark.parametrize("steps", [["zstd"], ["bf16"], ["bf16", "zstd"], ["int8", "zstd"]])
def test_a_compressed_update_passes(steps: list[str]) -> None:
    like: Payload = {"adapter": {"w": torch.full((40, 50), 0.5)}}
    own = pipeline(steps)
    judged = accepted(reply(own.encode(like, 1)), Expected(like, own))
    assert torch.equal(judged.update["adapter"]["w"], like["adapter"]["w"])
    assert judged.content < 40 * 50 * 4 or steps == []


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.EVALUATE])
def test_where_no_update_is_expected_the_header_is_all(kind: Kind) -> None:
    task = replace(TASK, kind=kind)
    judged = accepted(reply(b"", kind=kind, num_examples=0), Expected(None), task)
    assert judged.update == {}
    refused(reply(b"junk", kind=kind), Code.TOO_LARGE, "at most 0", Expected(None), task)
    asked = Expected(None, most_examples=4)
    refused(reply(b"", kind=kind), Code.WEIGHT, "5 examples", asked, task)


# What does not: (case, verdict, a part of the reason)

FORMS = [
    (adapter(a=one(math.nan), b=B), Code.NOT_FINITE, "not finite"),
    (adapter(a=one(math.inf), b=B), Code.NOT_FINITE, "not finite"),
    (adapter(a=one(-math.inf), b=B), Code.NOT_FINITE, "not finite"),
    (adapter(a=one(2e6), b=B), Code.NORM, "beyond 1e+06"),
    (adapter(a=one(-3e38), b=B), Code.NORM, "beyond 1e+06"),
    (adapter(a=A.T, b=B), Code.FORM, "(3, 4), expected"),
    (adapter(a=A[:1], b=B), Code.FORM, "expected"),
    (adapter(a=A[:, :1], b=B), Code.FORM, "expected"),
    (adapter(a=torch.tensor(1.0), b=B), Code.FORM, "expected"),
    (adapter(a=A[None], b=B), Code.FORM, "expected"),
    (adapter(a=A[:0], b=B), Code.FORM, "expected"),
    (adapter(a=A.half(), b=B), Code.FORM, "float16"),
    (adapter(a=A.bfloat16(), b=B), Code.FORM, "bfloat16"),
    (adapter(a=A.double(), b=B), Code.FORM, "float64"),
    (adapter(a=A.int(), b=B), Code.FORM, "int32"),
    (adapter(a=A.char(), b=B), Code.MALFORMED, "int8"),
    (adapter(a=A.to(torch.complex64), b=B), Code.MALFORMED, "complex64"),
    (adapter(a=A.bool(), b=B), Code.MALFORMED, "bool"),
    (adapter(a=A), Code.FORM, "1 tensors"),
    (adapter(b=B), Code.FORM, "1 tensors"),
    (adapter(a=A, b=B, extra=B.clone()), Code.FORM, "'extra'"),
    (adapter(a=A, renamed=B), Code.FORM, "2 tensors"),
    ({"adapter": LIKE["adapter"]}, Code.FORM, "groups"),
    ({**LIKE, "more": {}}, Code.FORM, "groups"),
    ({"other": LIKE["adapter"], "head": {}}, Code.FORM, "groups"),
    ({"adapter": LIKE["adapter"], "head": {"w": A.clone()}}, Code.FORM, "'head'"),
    ({}, Code.FORM, "groups"),
    (b"", Code.FORM, "groups"),
    (codec.encode(LIKE)[:-1], Code.MALFORMED, "cannot be read"),
    (
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
        Code.MALFORMED,
        "cannot",
    ),
]


@pytest.mark.parametrize(("payload", "code", "why"), FORMS)
def test_a_payload_that_is_not_as_declared_is_refused(
    payload: Payload | bytes, code: Code, why: str
) -> None:
    refused(reply(payload), code, why)


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"num_examples": 0}, Code.WEIGHT, "no examples"),
        ({"num_examples": 10}, Code.WEIGHT, "10 examples"),
        ({"num_examples": 2**40 + 1}, Code.MALFORMED, "examples"),
        ({"run_id": "cd" * 16}, Code.FOREIGN, "another run"),
        ({"run_id": ""}, Code.FOREIGN, "another run"),
        ({"client": "ben"}, Code.FOREIGN, "client"),
        ({"client": ""}, Code.FOREIGN, "client"),
        ({"client": "Ada"}, Code.FOREIGN, "client"),
        ({"kind": Kind.EVALUATE}, Code.FOREIGN, "task"),
        ({"kind": Kind.HELLO}, Code.FOREIGN, "task"),
        ({"round": 2}, Code.STALE, "round 2, not 3"),
        ({"round": 4}, Code.STALE, "stale"),
        ({"base_version": "v2"}, Code.STALE, "stale"),
        ({"base_version": ""}, Code.STALE, "stale"),
        ({"clients": 1}, Code.FORM, "gateway"),
        ({"bundle": True}, Code.FORM, "gateway"),
        ({"error": "out of memory"}, Code.CLIENT_ERROR, "out of memory"),
        ({"error": "two\nlines\x1b[2J" + "x" * 5000}, Code.CLIENT_ERROR, "two lines [2J"),
        ({"missing": ["A"], "error": "A: not held here"}, Code.MISSING, "A: not held here"),
        ({"missing": ["A"]}, Code.MISSING, "missing"),
    ],
)
def test_a_reply_to_something_else_is_refused(
    changes: dict[str, Any], code: Code, why: str
) -> None:
    refused(reply(**changes), code, why)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"schema": 2}, Code.VERSION),
        ({"schema": messages.SCHEMA + 1}, Code.VERSION),
        ({"kind": 9}, Code.MALFORMED),
        ({"num_examples": 2**64 - 1}, Code.MALFORMED),
        ({"payload_bytes": 3}, Code.MALFORMED),
        ({"payload_sha256": "0" * 64}, Code.MALFORMED),
        ({"model_sha256": "../.."}, Code.MALFORMED),
        ({"clients": 2**32 - 1}, Code.MALFORMED),
        ({"run_id": "é" * 30}, Code.FOREIGN),
    ],
)
def test_a_header_that_no_sender_writes_is_refused(fields: dict[str, Any], code: Code) -> None:
    refused(header(reply(), **fields), code)


def test_silence_has_a_verdict() -> None:
    refused(None, Code.NO_ANSWER, "no answer")


@pytest.mark.parametrize("packet", [Packet(b"", b""), Packet(b"\xff" * 50, b""), Packet(b"", b"x")])
def test_what_is_no_message_is_refused(packet: Packet) -> None:
    assert judge(packet, "ada", TASK, EXPECT).verdict.code in (Code.VERSION, Code.MALFORMED)


def test_the_base_model_is_the_one_of_the_task() -> None:
    task = replace(TASK, model_sha256="ab" * 32)
    accepted(reply(model_sha256="ab" * 32), task=task)
    accepted(reply(model_sha256="ab" * 32))  # a run in one process does not ask
    accepted(reply(), task=task)  # it was refused on the device
    refused(reply(model_sha256="cd" * 32), Code.FOREIGN, "cdcdcdcd, not abababab", task=task)


def test_metrics_that_are_not_finite_are_dropped_and_the_update_counts() -> None:
    head = pb.Reply.FromString(reply(metrics={"loss": 2.0}).header)
    head.metrics.update({"nan": math.nan, "inf": math.inf, "huge": -1.7e308})
    judged = accepted(Packet(head.SerializeToString(), codec.encode(LIKE)))
    assert judged.reply is not None
    assert judged.reply.metrics == {"loss": 2.0}


# Sizes, before anything is decoded


def test_the_limit_of_a_payload_is_a_quarter_above_an_honest_one() -> None:
    like: Payload = {"adapter": {"w": torch.zeros(1 << 18)}}
    honest = codec.encode(like)
    limit = most_bytes(Expected(like))
    assert len(honest) < limit < 1.25 * len(honest) + 2048
    junk = b"\xff" * limit
    refused(reply(junk), Code.MALFORMED, "header", Expected(like))
    refused(reply(junk + b"\xff"), Code.TOO_LARGE, f"at most {limit}", Expected(like))
    big = Packet(b"\x00" * (limits.MAX_REPLY_HEADER + 1), b"")
    refused(big, Code.TOO_LARGE, "header has")


@pytest.mark.parametrize("names", ["plain", 'quo"te', "日本\\", "\x01\x02", "é" * 60])
def test_honest_framing_always_fits(names: str) -> None:
    like: Payload = {
        f"{names}{g}": {f"{names}.{i}": torch.zeros(0) for i in range(40)} for g in range(9)
    }
    data = codec.encode(like)
    accepted(reply(data), Expected(like))


def test_a_header_inside_the_payload_is_no_larger_than_the_form_needs() -> None:
    """JSON takes thirty times its bytes when it is parsed."""
    like: Payload = {"adapter": {"w": torch.zeros(1 << 18)}}
    text = b'{"__metadata__":{"groups":"[]"},"x":[' + b"[]," * 300_000 + b"[]]}"
    refused(
        reply(struct.pack("<Q", len(text)) + text), Code.MALFORMED, "its header has", Expected(like)
    )


def lying(**entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": {"groups": '["adapter","head"]'}, **entries}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "shape", [[1 << 28], [1 << 40], [1 << 62], [0, 1 << 62, 4], [-1], [1.5], "x", [[3]]]
)
def test_tensors_that_are_not_there_are_not_allocated(shape: object) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    refused(reply(lying(**{"adapter/x.lora_A": entry})), Code.MALFORMED, "cannot be read")


@pytest.mark.parametrize("claims", [True, False])
def test_a_zstd_bomb_is_not_inflated(claims: bool) -> None:
    own = pipeline(["zstd"])
    like: Payload = {"adapter": {"w": torch.zeros(2000)}}
    engine = zstandard.ZstdCompressor(write_content_size=claims)
    frame = engine.compress(b"\x00" * (64 << 20))
    box = {"": {"zstd": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}}
    assert len(frame) < most_bytes(Expected(like, own))
    refused(reply(codec.encode(box)), Code.MALFORMED, "claims", Expected(like, own))


@pytest.mark.parametrize("steps", [["zstd"], ["bf16"], ["int8"], ["top_k:0.5", "int4", "zstd"]])
def test_a_compressed_payload_of_another_form_is_refused(steps: list[str]) -> None:
    own = pipeline(steps)
    refused(reply(own.encode(adapter(a=A[:1], b=B), 1)), Code.MALFORMED, "", Expected(LIKE, own))
    refused(
        reply(own.encode({**LIKE, "more": {"w": A.int()}}, 1)), Code.FORM, "", Expected(LIKE, own)
    )


def test_values_that_are_not_finite_are_found_behind_a_codec() -> None:
    own = pipeline(["bf16"])
    sent = dict(own.pack(LIKE, 1)[""])
    sent["content"] = sent["content"].clone()
    sent["content"].view(torch.bfloat16)[3] = math.inf
    refused(reply(codec.encode({"": sent})), Code.NOT_FINITE, "", Expected(LIKE, own))


# Norms, in the space in which updates are added up


def test_the_norm_is_that_of_all_tensors_together() -> None:
    norm = math.sqrt(sum(i * i for i in range(12)) + 8)
    accepted(reply(), replace(EXPECT, max_norm=norm))
    accepted(reply(), replace(EXPECT, max_norm=norm * (1 - 5e-7)))  # clipped in float32
    refused(reply(), Code.NORM, "norm 22.67, at most 22.66", replace(EXPECT, max_norm=norm - 0.01))


def factored(scale_a: float = 1.0, scale_b: float = 1.0) -> Payload:
    a = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]) * scale_a
    b = torch.tensor([[2.0, 1.0], [0.5, -1.0], [1.0, 1.0], [0.0, 4.0]]) * scale_b
    return {"factors": {"x.lora_A": a, "x.lora_B": b}, "head": {"bias": torch.tensor([3.0])}}


def dense_norm(payload: Payload) -> float:
    """Of B · A and the head, formed."""
    own = payload["factors"]
    product = own["x.lora_B"].double() @ own["x.lora_A"].double()
    return math.hypot(float(product.norm()), float(payload["head"]["bias"].double().norm()))


def test_where_products_are_added_the_norm_is_that_of_the_product() -> None:
    """(100 A, B / 100) is the same update."""
    most = dense_norm(factored())
    expect = Expected(factored(), max_norm=most * 1.0001, space="products")
    accepted(reply(factored()), expect)
    accepted(reply(factored(100, 1 / 100)), expect)
    refused(reply(factored(1, 1.001)), Code.NORM, f"norm {1.001 * most:.2f}"[:8], expect)
    in_tensors = replace(expect, space="tensors")
    refused(reply(factored(100, 1 / 100)), Code.NORM, "", in_tensors)


def test_factors_that_only_cancel_each_other_are_refused() -> None:
    """Their product is 0 here and anything on a device that multiplies in float32."""
    a = torch.tensor([[9e5, 9e5, 9e5], [9e5, 9e5, 9e5]])
    b = torch.tensor([[9e5, -9e5]] * 4)
    null: Payload = {"factors": {"x.lora_A": a, "x.lora_B": b}, "head": {"bias": torch.zeros(1)}}
    refused(
        reply(null), Code.NORM, "factors span", Expected(factored(), max_norm=10, space="products")
    )


# Scalar groups, which travel in the header

G = torch.tensor([0.5, -2.0, 0.0])
SCALARS: Params = {
    "scalars": G,
    "step": torch.tensor(-0.1),
    "directions": torch.tensor([7, 0, 7], dtype=torch.int32),
}
DIRECTED = Expected(
    {
        "scalars": {
            "scalars": torch.zeros(3),
            "step": torch.tensor(-0.1),
            "directions": torch.full((3,), 7, dtype=torch.int32),
        }
    }
)


def seeded(seed: int) -> Params:
    step = torch.tensor(1.0)
    return {"scalars": G.half(), "step": step, "seed": torch.tensor(seed)}


def answer(payload: Payload, **changes: Any) -> Packet:
    """A reply as a client packs it."""
    dense, scalars = messages.enclose(payload)
    return reply(dense, scalars=scalars, **changes)


def test_an_honest_reply_of_scalars_passes() -> None:
    update = accepted(answer({"scalars": SCALARS}), DIRECTED).update
    assert update.keys() == {"scalars"}
    assert update["scalars"].keys() == SCALARS.keys()
    assert all(torch.equal(update["scalars"][n], t) for n, t in SCALARS.items())


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_the_seed_is_the_one_that_the_client_was_given(seed: int) -> None:
    """A client that chose its own directions could undo what others learnt."""
    expect = Expected({"scalars": seeded(seed)})
    accepted(answer({"scalars": seeded(seed)}), expect)
    other = seeded(seed + (-1 if seed else 1))
    refused(answer({"scalars": other}), Code.FORM, "update has seed", expect)


@pytest.mark.parametrize("factor", [1.0, 1 + 2e-7, 1 - 5e-6])
def test_a_step_may_differ_by_the_rounding_of_another_machine(factor: float) -> None:
    step = torch.tensor(-0.1 * factor)
    update = accepted(answer({"scalars": {**SCALARS, "step": step}}), DIRECTED).update
    assert float(update["scalars"]["step"]) == float(step)  # as it was sent


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, 0.999, 10.0, 1e6])
def test_the_step_is_the_one_of_the_schedule(factor: float) -> None:
    """A larger one would be a larger weight."""
    step = torch.tensor(-0.1 * factor)
    sent = answer({"scalars": {**SCALARS, "step": step}})
    refused(sent, Code.FORM, "in 'scalars', not -0.1", DIRECTED)


def test_scalars_beside_tensors_pass() -> None:
    assert DIRECTED.like is not None
    like: Payload = {**LIKE, **DIRECTED.like}
    update = accepted(answer({**LIKE, "scalars": SCALARS}), Expected(like)).update
    assert update.keys() == like.keys()


def test_the_norm_of_scalars_is_the_move_along_each_direction() -> None:
    """Direction 7 is taken twice: 0.1 · |(−2, 0.5 + 0)| by hand."""
    most = 0.1 * math.hypot(2.0, 0.5)
    accepted(answer({"scalars": SCALARS}), replace(DIRECTED, max_norm=most * 1.001))
    refused(answer({"scalars": SCALARS}), Code.NORM, "", replace(DIRECTED, max_norm=most * 0.999))


def without(name: str) -> Params:
    return {n: t for n, t in SCALARS.items() if n != name}


def directed(*directions: int) -> Params:
    return {**SCALARS, "directions": torch.tensor(directions, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("payload", "code", "why"),
    [
        ({"scalars": {**SCALARS, "scalars": G * math.nan}}, Code.NOT_FINITE, "not finite"),
        ({"scalars": {**SCALARS, "scalars": G + math.inf}}, Code.NOT_FINITE, "not finite"),
        ({"scalars": {**SCALARS, "scalars": G + 2e6}}, Code.NORM, "beyond 1e+06"),
        ({"scalars": {**SCALARS, "scalars": G.half()}}, Code.FORM, "float16"),
        ({"scalars": {**directed(1, 2), "scalars": G[:2]}}, Code.FORM, "(2,), expected"),
        ({"scalars": {**directed(1, 2, 3, 4), "scalars": torch.ones(4)}}, Code.FORM, "(4,), exp"),
        ({"scalars": {**directed(), "scalars": G[:0]}}, Code.FORM, "(0,), expected"),
        ({"scalars": directed(0, 8, 1)}, Code.FORM, "'directions' of 'scalars' is not between 0"),
        ({"scalars": directed(0, 65535, 1)}, Code.FORM, "not between 0 and 7"),
        ({"scalars": without("directions")}, Code.FORM, "1 tensors of 'scalars', first 'dir"),
        ({"scalars": without("step")}, Code.FORM, "first 'step'"),
        ({"scalars": {**SCALARS, "seed": torch.tensor(3)}}, Code.FORM, "first 'seed'"),
        ({"scalars": SCALARS, "more": SCALARS}, Code.FORM, "groups"),
        ({"other": SCALARS}, Code.FORM, "groups"),
        ({}, Code.FORM, "groups"),
        ({"scalars": {"x": G}}, Code.FORM, "4 tensors of 'scalars'"),
    ],
)
def test_scalars_that_are_not_as_declared_are_refused(
    payload: Payload, code: Code, why: str
) -> None:
    refused(answer(payload), code, why, DIRECTED)


@pytest.mark.parametrize("expect", [EXPECT, DIRECTED])
def test_a_group_cannot_come_twice(expect: Expected) -> None:
    """As tensors in the payload and as scalars in the header."""
    assert expect.like is not None
    (name, *_) = expect.like
    twice = reply(codec.encode({name: {"x": G}}), scalars={name: SCALARS})
    refused(twice, Code.MALFORMED, f"group '{name}' is there as tensors and as scalars", expect)


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
def test_scalars_that_no_sender_writes_are_refused(field: str, value: object) -> None:
    head = pb.Reply.FromString(answer({"scalars": SCALARS}).header)
    setattr(head.scalars[0], field, value)
    refused(Packet(head.SerializeToString(), b""), Code.MALFORMED, "", DIRECTED)


# Gateways: partial aggregates

SUMS: Payload = {
    "adapter": {n: t.double() for n, t in LIKE["adapter"].items()},
    "head": {},
}
PARTIAL = replace(EXPECT, sums=SUMS, most_clients=3)
SEATED = replace(TASK, seats=3)


def partial(scale: float = 1.0, **changes: Any) -> Packet:
    sums = {g: {n: scale * t for n, t in p.items()} for g, p in SUMS.items()}
    return reply(**{"payload": sums, "clients": 3, "num_examples": 12, **changes})


def test_a_partial_aggregate_passes() -> None:
    judged = accepted(partial(), PARTIAL, SEATED)
    assert judged.update["adapter"]["x.lora_A"].dtype == torch.float64
    assert torch.equal(judged.update["adapter"]["x.lora_A"], A.double())
    assert judged.content == 8 * (12 + 8)


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"clients": 0}, Code.FORM, "no partial aggregate"),
        ({"clients": 4}, Code.WEIGHT, "4 clients, 3 were asked"),
        ({"clients": 2, "num_examples": 19}, Code.WEIGHT, "can have: 18"),
        ({"clients": 3, "num_examples": 2}, Code.WEIGHT, "at least 3"),
        ({"clients": 3, "num_examples": 28}, Code.WEIGHT, "can have: 27"),
        ({"bundle": True}, Code.FORM, "no partial aggregate"),
        ({"scale": math.nan}, Code.NOT_FINITE, "not finite"),
        ({"scale": math.inf}, Code.NOT_FINITE, "not finite"),
        ({"scale": 13e6}, Code.NORM, "beyond 1e+07"),
        ({"payload": codec.encode(LIKE)}, Code.FORM, "float32"),
        ({"payload": codec.encode({**SUMS, "more": {}})}, Code.FORM, "groups"),
        ({"scalars": {"scalars": SCALARS}}, Code.FORM, "groups"),
    ],
)
def test_a_partial_aggregate_that_cannot_be_is_refused(
    changes: dict[str, Any], code: Code, why: str
) -> None:
    refused(partial(**changes), code, why, PARTIAL, SEATED)


def test_a_sum_is_no_longer_than_so_many_updates_can_make_it() -> None:
    """|Σ w x| ≤ Σ w · max |x|, by hand: |(0…11)|² + 8 = 514."""
    bound = math.sqrt(514) / 12
    accepted(partial(), replace(PARTIAL, max_norm=bound * 1.001), SEATED)
    refused(partial(), Code.NORM, "norm 22.67", replace(PARTIAL, max_norm=bound * 0.999), SEATED)
    counted = replace(PARTIAL, sums={**SUMS, "counts": {"n": torch.zeros(1).double()}})
    with_counts = codec.encode({**SUMS, "counts": {"n": torch.tensor([1e4]).double()}})
    judged = replace(counted, max_norm=bound * 1.001)
    accepted(partial(payload=with_counts), judged, SEATED)  # they are no part of the update


BOTH: Payload = {
    "adapter": SUMS["adapter"],
    "signs": {"sum.directions": torch.ones(4).double()},
    "counts": {"sum.counts": torch.ones(2).double()},
}
OF_BOTH = replace(
    PARTIAL,
    like={"adapter": LIKE["adapter"], "signs": {}},
    sums=BOTH,
    parts={frozenset({"adapter", "counts"}): 9, frozenset({"signs", "counts"}): 9},
)
"""Of a gateway whose phones may be of two classes: one sends an adapter, one signs."""


def of_groups(*groups: str, **changes: Any) -> Packet:
    found = {**BOTH, "more": {"x": torch.ones(1).double()}}
    payload = codec.encode({group: found[group] for group in groups})
    return reply(**{"payload": payload, "clients": 3, "num_examples": 12, **changes})


@pytest.mark.parametrize(
    "groups", [("adapter", "counts"), ("signs", "counts"), ("adapter", "signs", "counts")]
)
def test_sums_hold_the_groups_of_one_class_of_phones_or_of_both(groups: tuple[str, ...]) -> None:
    judged = accepted(of_groups(*groups), OF_BOTH, SEATED)
    assert judged.update.keys() == set(groups)


@pytest.mark.parametrize(
    "groups",
    [
        (),
        ("counts",),
        ("adapter",),
        ("signs",),
        ("adapter", "signs"),
        ("adapter", "counts", "more"),
        ("adapter", "signs", "counts", "more"),
    ],
)
def test_sums_of_no_class_of_phones_are_refused(groups: tuple[str, ...]) -> None:
    refused(of_groups(*groups), Code.FORM, "groups", OF_BOTH, SEATED)
    if groups != ("adapter",):
        refused(of_groups(*groups), Code.FORM, "groups", replace(OF_BOTH, parts={}), SEATED)


def test_sums_of_two_classes_are_bounded_as_those_of_one() -> None:
    weight = {"clients": 3, "num_examples": 28}
    refused(of_groups("signs", "counts", **weight), Code.WEIGHT, "27", OF_BOTH, SEATED)
    for groups, norm in ((("adapter", "counts"), 514), (("adapter", "signs", "counts"), 518)):
        bound = math.sqrt(norm) / 12
        near, far = (replace(OF_BOTH, max_norm=bound * k) for k in (1.001, 0.999))
        accepted(of_groups(*groups), near, SEATED)
        refused(of_groups(*groups), Code.NORM, "norm", far, SEATED)


def test_a_class_of_phones_cannot_claim_the_weight_of_another() -> None:
    """9 examples at most of who sends an adapter, 2 of who signs."""
    adapters, signed = (frozenset({own, "counts"}) for own in ("adapter", "signs"))
    either = replace(OF_BOTH, parts={adapters: 9, signed: 2})
    accepted(of_groups("adapter", "counts", num_examples=27), either, SEATED)
    accepted(of_groups("signs", "counts", num_examples=6), either, SEATED)
    refused(of_groups("signs", "counts", num_examples=7), Code.WEIGHT, "6", either, SEATED)


@pytest.mark.parametrize(
    ("adapters", "signed", "passes"),
    [
        ((9.0, 1.0), (3.0, 2.0), True),
        ((8.0, 1.0), (4.0, 2.0), True),
        ((7.0, 1.0), (5.0, 2.0), False),
        ((10.0, 1.0), (2.0, 2.0), False),
        ((6.0, 2.0), (6.0, 3.0), False),
        ((6.0, 1.0), (6.0, 1.0), False),
        ((math.nan, 1.0), (3.0, 2.0), False),
        ((9.0, math.nan), (3.0, 2.0), False),
    ],
)
def test_examples_and_clients_of_each_class_agree_with_the_reply(
    adapters: tuple[float, float], signed: tuple[float, float], passes: bool
) -> None:
    """3 clients, 12 examples; at most 9 of one with an adapter, 2 of one that signs."""
    parts = {frozenset({"adapter", "counts"}): 9, frozenset({"signs", "counts"}): 2}
    tally = {"adapter": adapters, "signs": signed}
    either = replace(OF_BOTH, parts=parts, tally=lambda sums: tally)
    packet = of_groups("adapter", "signs", "counts")
    if passes:
        accepted(packet, either, SEATED)
    else:
        refused(packet, Code.WEIGHT, "", either, SEATED)


# Gateways: bundles

BUNDLE = replace(EXPECT, most_clients=3)


def phone(name: str, **changes: Any) -> Packet:
    return reply(**{"client": name, **changes})


def bundle(*packets: Packet, **changes: Any) -> Packet:
    honest = {"clients": len(packets), "bundle": True, "num_examples": 0}
    return reply(**{"payload": pack_bundle(packets), **honest, **changes})


def test_members_of_a_bundle_are_judged_as_if_they_had_answered_themselves() -> None:
    bad = phone("ada/p2", payload=adapter(a=one(math.nan), b=B))
    judged = accepted(bundle(phone("ada/p1"), bad, phone("ada/p3", num_examples=7)), BUNDLE, SEATED)
    assert list(judged.members) == ["ada/p1", "ada/p2", "ada/p3"]
    codes = {name: member.verdict.code for name, member in judged.members.items()}
    assert codes == {
        "ada/p1": Code.ACCEPTED,
        "ada/p2": Code.NOT_FINITE,
        "ada/p3": Code.ACCEPTED,
    }
    assert torch.equal(judged.members["ada/p3"].update["adapter"]["x.lora_A"], A)
    assert (judged.update, judged.content) == ({}, 2 * 80)


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (phone("ben/p1"), Code.FOREIGN),
        (phone("ada"), Code.FOREIGN),
        (phone("ada\x1b[2J/p1"), Code.FOREIGN),
        (phone("ada/\n"), Code.FOREIGN),
        (phone("ada/" + "p" * 200), Code.FOREIGN),
        (phone("ada/p1"), Code.FOREIGN),  # the second of this name
        (Packet(b"\xff", b""), Code.FOREIGN),
    ],
)
def test_a_member_without_a_name_of_its_own_does_not_count(packet: Packet, code: Code) -> None:
    judged = accepted(bundle(phone("ada/p1"), packet), BUNDLE, SEATED)
    codes = {name: member.verdict.code for name, member in judged.members.items()}
    assert codes == {"ada/p1": Code.ACCEPTED, "ada#1": code}


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (phone("ada/p1", round=2), Code.STALE),
        (phone("ada/p1", run_id="cd" * 16), Code.FOREIGN),
        (phone("ada/p1", num_examples=10), Code.WEIGHT),
        (phone("ada/p1", clients=3), Code.FORM),
        (bundle(phone("ada/p1/q"), client="ada/p1"), Code.FORM),  # a bundle in a bundle
        (phone("ada/p1", error="busy"), Code.CLIENT_ERROR),
        (phone("ada/p1", payload=b"\xff" * 20000), Code.TOO_LARGE),
    ],
)
def test_a_member_of_a_bundle_has_its_own_verdict(packet: Packet, code: Code) -> None:
    judged = accepted(bundle(packet, phone("ada/p2")), BUNDLE, SEATED)
    codes = {name: member.verdict.code for name, member in judged.members.items()}
    assert codes == {"ada/p1": code, "ada/p2": Code.ACCEPTED}


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (bundle(*[phone(f"ada/p{i}") for i in range(4)]), Code.WEIGHT),
        (bundle(*[phone(f"ada/p{i}") for i in range(4)], clients=3), Code.MALFORMED),
        (bundle(phone("ada/p1"), clients=2), Code.FORM),
        (bundle(phone("ada/p1"), bundle=False), Code.FORM),
        (bundle(), Code.FORM),
        (bundle(phone("ada/p1"), payload=b"\xff\xff\xff"), Code.MALFORMED),
        (bundle(phone("ada/p1"), payload=b"\x00" * 300_000), Code.TOO_LARGE),
        (partial(), Code.FORM),
    ],
)
def test_a_bundle_that_cannot_be_is_refused(packet: Packet, code: Code) -> None:
    refused(packet, code, "", BUNDLE, SEATED)


def test_entries_of_a_bundle_are_counted_before_they_are_parsed() -> None:
    """Each takes 2 bytes here and 60 afterwards."""
    like: Payload = {"adapter": {"w": torch.zeros(1 << 20)}}
    expect = Expected(like, most_clients=3)
    data = b"\x0a\x00" * (most_bytes(expect) // 2)
    before = resident()
    restart_peak()
    refused(bundle(payload=data, clients=3), Code.MALFORMED, "more than 3", expect, SEATED)
    assert peak() - before < 3 * len(data)
    # the count is over what the entries are, whatever their form
    many = b"".join(b"\x0a\x80\x00" for _ in range(4))
    refused(bundle(payload=many, clients=3), Code.MALFORMED, "more than 3", expect, SEATED)


def test_every_member_of_a_bundle_may_be_expected_to_differ() -> None:
    """Each has a seed of its own."""
    seeds = {"ada/p1": 11, "ada/p2": 22}
    expect = replace(
        BUNDLE,
        like={"scalars": seeded(0)},
        member=lambda name: [Expected({"scalars": seeded(seeds[name])})],
    )
    packets = [answer({"scalars": seeded(11)}, client=name) for name in seeds]
    judged = accepted(bundle(*packets), expect, SEATED)
    codes = {name: member.verdict.code for name, member in judged.members.items()}
    assert codes == {"ada/p1": Code.ACCEPTED, "ada/p2": Code.FORM}


def test_a_member_of_a_bundle_is_judged_by_the_class_whose_form_it_has() -> None:
    """One class sends an adapter and has 9 examples at most, the other scalars, and 20."""
    classes = [replace(EXPECT, most_examples=9), Expected({"scalars": seeded(1)}, most_examples=20)]
    expect = replace(BUNDLE, like={**LIKE, "scalars": seeded(1)}, member=lambda name: classes)
    given = {
        "ada/p1": phone("ada/p1", num_examples=9),
        "ada/p2": answer({"scalars": seeded(1)}, client="ada/p2", num_examples=20),
        "ada/p3": phone("ada/p3", num_examples=20),
    }
    judged = accepted(bundle(*given.values()), expect, SEATED)
    codes = {name: member.verdict.code for name, member in judged.members.items()}
    assert codes == {"ada/p1": Code.ACCEPTED, "ada/p2": Code.ACCEPTED, "ada/p3": Code.WEIGHT}
    assert judged.members["ada/p2"].update.keys() == {"scalars"}


@pytest.mark.parametrize("norm", [None, 10.0])
def test_sums_of_seeded_directions_are_bounded_by_their_step(norm: float | None) -> None:
    """8 phones, 4 scalars, |g| ≤ 10, step 1e-3: a sum moves by at most Σw · 1e-3 · 2 · 10."""
    scalars = {"scalars": torch.zeros(4), "step": torch.tensor(-1e-3), "seed": torch.tensor(1)}
    like: Payload = {"scalars": scalars}
    form = summed_like({"scalars": {"directions": torch.zeros(16, dtype=torch.float64)}})
    expect = Expected(like, most_examples=9, max_norm=norm, sums=form, most_clients=8)
    [(group, own)] = form.items()
    [name] = own

    def told(value: float) -> Packet:
        moved = torch.zeros(16, dtype=torch.float64)
        moved[3] = value
        return reply({group: {name: moved}}, clients=8, num_examples=40)

    bound = 40 * 1e-3 * 2 * (norm or 1e6)
    accepted(told(0.99 * bound), expect)
    refused(told(1.01 * bound), Code.NORM, expect=expect)
