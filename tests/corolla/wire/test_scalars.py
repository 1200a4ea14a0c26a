import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.types import Params, Payload
from corolla.wire import limits, messages, scalar_groups
from corolla.wire.messages import Kind, Log, Reply, Task
from corolla.wire.packet import Packet

RUN = "0123456789abcdef" * 2
ORIGIN, SINCE, VERSION = "a" * 32, "b" * 32, "c" * 32
TASK = Task(RUN, 1, "v", Kind.TRAIN, "")
REPLY = Reply(RUN, 1, "v", Kind.TRAIN, "c", missing=[])

SPECIAL = [0.0, -0.0, 1.0, -2.5, 2.0**-24, -(2.0**-14), 65504.0]
FP32 = [*SPECIAL, 1e-45, -1e-40, 3e38]


def vector(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def places(size: int, filled: Mapping[int, float], dtype: torch.dtype) -> torch.Tensor:
    """A vector that is zero but for some indices."""
    found = torch.zeros(size, dtype=dtype)
    for index, value in filled.items():
        found[index] = value
    return found


def seed(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def same_params(a: Params, b: Params) -> bool:
    """Names, types, shapes and every bit."""
    return a.keys() == b.keys() and all(
        t.dtype == b[k].dtype
        and t.shape == b[k].shape
        and t.numpy().tobytes() == b[k].numpy().tobytes()
        for k, t in a.items()
    )


def same_payload(a: Payload, b: Payload) -> bool:
    return list(a) == list(b) and all(same_params(a[group], b[group]) for group in a)


def same_task(a: Task, b: Task) -> bool:
    bare = replace(a, scalars={}, log=None) == replace(b, scalars={}, log=None)
    if not bare or not same_payload(a.scalars, b.scalars):
        return False
    if a.log is None or b.log is None:
        return a.log is b.log
    rows = zip(a.log.rows, b.log.rows, strict=True)
    return replace(a.log, rows=()) == replace(b.log, rows=()) and all(
        same_params(x, y) for x, y in rows
    )


def same_reply(a: Reply, b: Reply) -> bool:
    bare = replace(a, scalars={}) == replace(b, scalars={})
    return bare and same_payload(a.scalars, b.scalars)


def there_and_back(params: Params) -> Params:
    return messages.unpack_reply(
        messages.pack_reply(replace(REPLY, scalars={"z": params})), 0
    ).scalars["z"]


def entry(params: Params) -> pb.Scalars:
    head = pb.Reply()
    head.ParseFromString(messages.pack_reply(replace(REPLY, scalars={"z": params})).header)
    return head.scalars[0]


@st.composite
def groups(draw: st.DrawFn) -> Params:
    """Scalar groups of all sizes, densities and types."""
    half = draw(st.booleans())
    n = draw(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 4096, 40000, 65536])))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.5, 1.0]))
    values = random.choice(SPECIAL if half else FP32, n) * (random.random(n) < density)
    # The product with False keeps the sign of a zero.
    found = {
        "scalars": torch.from_numpy(values.astype(np.float16 if half else np.float32)),
        "directions": torch.from_numpy(random.integers(0, 65536, n).astype(np.int32)),
        "seed": seed(draw(st.sampled_from([0, 1, 2**31, 2**32 - 1]))),
        "step": torch.tensor(draw(st.floats(width=32, allow_nan=False, allow_infinity=False))),
    }
    dropped = draw(st.sets(st.sampled_from(["directions", "seed", "step"])))
    return {name: tensor for name, tensor in found.items() if name not in dropped}


@given(groups())
def test_every_group_comes_back(params: Params) -> None:
    assert same_params(there_and_back(params), params)


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9), groups(), max_size=2),
    st.none() | st.lists(groups(), max_size=3),
)
def test_every_task_comes_back(scalars: Payload, rows: list[Params] | None) -> None:
    log = None if rows is None else Log(ORIGIN, SINCE, VERSION, rows, 1000)
    task = replace(TASK, payload=b"dense", cached={"A": RUN}, scalars=scalars, log=log)
    assert same_task(messages.unpack_task(messages.pack_task(task)), task)


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=9), groups(), max_size=2))
def test_every_reply_comes_back(scalars: Payload) -> None:
    reply = replace(REPLY, payload=b"dense", num_examples=3, metrics={"x": 1.0}, scalars=scalars)
    assert same_reply(messages.unpack_reply(messages.pack_reply(reply), 5), reply)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_are_not_finite_travel_in_replies(dtype: torch.dtype) -> None:
    """With every bit of a NaN; what folds replies in refuses them."""
    params = {"scalars": vector([math.nan, -math.inf, math.inf, 0.0] + [0.0] * 20, dtype)}
    params["scalars"].view(torch.int32 if dtype == torch.float32 else torch.int16)[0] += 5
    assert same_params(there_and_back(params), params)


def test_tensors_of_a_message_are_its_own() -> None:
    for scalars in (vector([1.0, 2.0]), places(99, {5: 1.0}, torch.float32)):
        params = {"scalars": scalars, "seed": seed(1)}
        packet = messages.pack_reply(replace(REPLY, scalars={"z": params}))
        first = messages.unpack_reply(packet, 0).scalars["z"]
        for tensor in first.values():
            tensor.add_(1)
        assert same_params(messages.unpack_reply(packet, 0).scalars["z"], params)


def test_tensors_of_any_layout_are_sent() -> None:
    spread = torch.arange(12, dtype=torch.float32)[::3].requires_grad_()
    assert there_and_back({"scalars": spread})["scalars"].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_groups_are_told_apart() -> None:
    payload = {
        "A": {"m.lora_A": torch.ones(2, 2)},
        "zo": {"scalars": vector([1.0])},
        "empty": {},
        "more": {"scalars": vector([2.0]), "seed": seed(1)},
    }
    dense, scalars = scalar_groups.split(payload)
    assert (list(dense), list(scalars)) == (["A", "empty"], ["zo", "more"])
    assert {**dense, **scalars} == payload
    assert [scalar_groups.is_scalars(params) for params in payload.values()] == [
        False,
        True,
        False,
        True,
    ]
    assert scalar_groups.split({}) == ({}, {})


ONES = torch.ones(200)
FAR = places(1000, {5: 1.0, 300: -0.0, 999: -2.0}, torch.float32)


@pytest.mark.parametrize(
    ("params", "form", "content"),
    [
        ({"scalars": torch.ones(512).half()}, None, 512 * 2),
        ({"scalars": ONES.half(), "seed": seed(7)}, None, 200 * 2 + 4),
        ({"scalars": ONES, "directions": torch.arange(200).int()}, "fixed32", 200 * 8),
        # Directions are an order of steps: zeros are sent, whatever the sparse forms would need.
        ({"scalars": 0 * ONES, "directions": torch.zeros(200).int()}, "fixed32", 200 * 8),
        # Gaps 5, 295, 699 take 1 + 2 + 2 bytes; a bitmap takes 125, all values take 4000.
        ({"scalars": FAR}, "varint", 5 + 3 * 4),
        ({"scalars": FAR, "seed": seed(0), "step": torch.tensor(0.0)}, "varint", 5 + 12 + 8),
        # Every second of 16: 8 gaps take 8 bytes, a bitmap 2, the values left out 16.
        ({"scalars": vector([1.0, 0.0] * 8, torch.float16)}, "bitmap", 2 + 8 * 2),
        # One of 16 left out saves 2 bytes and a bitmap costs 2: dense.
        ({"scalars": vector([1.0] * 15 + [0.0], torch.float16)}, None, 32),
        # Two of 16: a bitmap takes 2 bytes, as do two gaps.
        ({"scalars": places(16, {0: 1.0, 15: 1.0}, torch.float32)}, "bitmap", 2 + 2 * 4),
        # Gaps of 127, 128, 16383, 16384 take 1 + 2 + 2 + 3 bytes.
        (
            {"scalars": places(65536, dict.fromkeys([127, 255, 16638, 33022], 1.0), torch.half)},
            "varint",
            8 + 4 * 2,
        ),
        ({"scalars": torch.zeros(65536)}, "varint", 0),
        ({"scalars": places(65536, {65535: 1.0}, torch.float32)}, "varint", 3 + 4),
        ({"scalars": -torch.zeros(9)}, None, 36),
        ({"scalars": torch.zeros(0)}, None, 0),
        ({"scalars": torch.zeros(0), "directions": torch.zeros(0).int()}, "fixed32", 0),
    ],
)
def test_bytes_are_those_counted_by_hand(params: Params, form: str | None, content: int) -> None:
    assert entry(params).WhichOneof("directions") == form
    assert scalar_groups.scalar_bytes(params) == content
    assert same_params(there_and_back(params), params)


def lebs(number: int) -> int:
    return max(1, math.ceil(number.bit_length() / 7))


@given(groups())
def test_a_header_is_framing_and_content(params: Params) -> None:
    """Of each field a tag of a byte, and of a field of bytes its length."""
    found = entry(params)
    framing = 3  # tag, length and letter of the name
    framing += 1 + lebs(found.size) if found.size else 0
    for name in ("fp32", "fp16", "fixed32", "varint", "bitmap"):
        if found.HasField(name):
            framing += 1 + lebs(len(getattr(found, name)))
    framing += found.HasField("seed") + found.HasField("step")
    content = scalar_groups.scalar_bytes(params)
    header = len(messages.pack_reply(replace(REPLY, scalars={"z": params})).header)
    outer = 1 + lebs(framing + content)
    assert header == len(messages.pack_reply(REPLY).header) + outer + framing + content


def test_the_form_is_the_shortest() -> None:
    for n in range(18):
        for bits in range(0, 1 << n, 1 + (1 << n) // 64):
            kept = [index for index in range(n) if bits >> index & 1]
            scalars = places(n, dict.fromkeys(kept, 1.0), torch.half)
            shortest = min(n * 2, (n + 7) // 8 + len(kept) * 2, len(kept) * 3)
            assert scalar_groups.scalar_bytes({"scalars": scalars}) == shortest


def test_bytes_of_a_message_are_golden() -> None:
    params = {"scalars": FAR, "seed": seed(0x01020304), "step": torch.tensor(0.5)}
    reply = Reply("r", 1, "v", Kind.TRAIN, "c", missing=[], scalars={"z": params})
    digest = b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    expected = (
        "0803 120172 1801 220176 2802 320163"  # schema, run, round, version, kind, client
        f"5240 {digest.hex()}"
        "6a25 0a017a 10e807"  # a group of 37 bytes, its name, its size
        "1a0c 0000803f 00000080 000000c0"  # 1, −0, −2
        "3205 05 a702 bb05"  # 5, 295 more, 699 more
        "45 04030201 4d 0000003f"  # seed and step
    )
    assert messages.pack_reply(reply).header == bytes.fromhex(expected)
    assert same_reply(messages.unpack_reply(Packet(bytes.fromhex(expected), b""), 0), reply)


def floats(n: int, value: float = 1.0) -> bytes:
    return struct.pack("<f", value) * n


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"size": 65537, "fp32": floats(65537)}, "size 65537, at most 65536"),
    ({"size": 1 << 23, "fp32": b"", "varint": b""}, "size 8388608"),
    ({"size": 65537, "fp32": b"", "bitmap": bytes(8193)}, "size 65537"),
    ({"size": 3}, "no values"),
    ({}, "no values"),
    ({"size": 3, "varint": b"\x00"}, "no values"),
    ({"size": 3, "fp32": floats(2)}, "8 bytes of values, 3 are float32"),
    ({"size": 3, "fp32": floats(4)}, "16 bytes of values"),
    ({"size": 3, "fp32": floats(3)[:-1]}, "11 bytes of values"),
    ({"size": 3, "fp16": floats(3)}, "12 bytes of values, 3 are float16"),
    ({"size": 0, "fp16": b"\x00\x00"}, "2 bytes of values, 0 are"),
    ({"size": 3, "fp32": floats(3), "fixed32": numbers(1, 2)}, "8 bytes of directions for 3"),
    ({"size": 3, "fp32": floats(3), "fixed32": numbers(1, 2, 3)[:-1]}, "11 bytes of directions"),
    ({"size": 2, "fp32": floats(3), "fixed32": numbers(1, 2, 3)}, "12 bytes of values"),
    ({"size": 2, "fp32": floats(2), "fixed32": numbers(1, 65536)}, "direction 65536"),
    ({"size": 2, "fp32": floats(2), "fixed32": numbers(1, 2**32 - 1)}, "direction 4294967295"),
    ({"size": 9, "fp32": floats(2), "varint": b"\x03\x00"}, "direction twice"),
    ({"size": 9, "fp32": floats(2), "varint": b"\x03\x80\x00"}, "direction twice"),
    ({"size": 9, "fp32": floats(2), "varint": b"\x03\x06"}, "direction 9, its size is 9"),
    ({"size": 9, "fp32": floats(1), "varint": b"\xff\xff\xff\xff\x7f"}, "direction 34359738367"),
    ({"size": 9, "fp32": floats(1), "varint": b"\x83"}, "truncated varint"),
    ({"size": 9, "fp32": floats(2), "varint": b"\x03\x81"}, "truncated varint"),
    ({"size": 9, "fp32": floats(1), "varint": b"\x80" * 5 + b"\x00"}, "varint of 6 bytes"),
    ({"size": 9, "fp32": floats(1), "varint": b"\x80" * 40 + b"\x00"}, "varint of 41 bytes"),
    ({"size": 9, "fp32": b"", "varint": b"\x01" * 46}, "46 bytes of varints for size 9"),
    ({"size": 9, "fp32": floats(1), "varint": b"\x03\x01"}, "4 bytes of values, 2 are"),
    ({"size": 9, "fp32": floats(2), "varint": b"\x03"}, "8 bytes of values, 1 are"),
    ({"size": 9, "fp32": floats(1), "bitmap": b"\x01"}, "bitmap of 1 bytes for size 9"),
    ({"size": 9, "fp32": floats(1), "bitmap": b"\x01\x00\x00"}, "bitmap of 3 bytes"),
    ({"size": 9, "fp32": floats(1), "bitmap": b"\x00\x02"}, "direction 9 in a bitmap of size 9"),
    ({"size": 9, "fp32": floats(1), "bitmap": b"\x03\x00"}, "4 bytes of values, 2 are"),
    ({"size": 0, "fp32": b"", "bitmap": b"\x00"}, "bitmap of 1 bytes"),
    *(
        ({"size": 1, "fp32": floats(1), "step": bad}, "step .*, not a finite one")
        for bad in (math.nan, math.inf, -math.inf)
    ),
]


def unpack_task(*rows: pb.Scalars, **fields: Any) -> Task:
    head = pb.Task()
    head.ParseFromString(messages.pack_task(TASK).header)
    if rows:
        head.log.CopyFrom(
            pb.Log(origin=ORIGIN, since=SINCE, version=VERSION, rows=rows, number=1000)
        )
    head.MergeFrom(pb.Task(**fields))
    return messages.unpack_task(Packet(head.SerializeToString(), b""))


def unpack_reply(*scalars: pb.Scalars) -> Reply:
    head = pb.Reply()
    head.ParseFromString(messages.pack_reply(REPLY).header)
    head.scalars.extend(scalars)
    return messages.unpack_reply(Packet(head.SerializeToString(), b""), 0)


@pytest.mark.parametrize(("fields", "reason"), HOSTILE)
def test_groups_that_lie_are_refused(fields: dict[str, Any], reason: str) -> None:
    named = pb.Scalars(group="z\n", **fields)
    good = pb.Scalars(size=1, fp32=floats(1))
    for read, where in (
        (lambda: unpack_reply(named), r"scalar group 'z\\n'"),
        (lambda: unpack_task(scalars=[named]), r"scalar group 'z\\n'"),
        (lambda: unpack_task(good, pb.Scalars(**fields)), "log row 1"),
    ):
        with pytest.raises(WireError, match=f"^{where} has .*{reason}") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[""], ["n" * 129], ["z", "y", "z"]])
def test_names_of_groups_are_checked(names: list[str]) -> None:
    found = [pb.Scalars(group=name, size=1, fp32=floats(1)) for name in names]
    with pytest.raises(WireError, match=r"characters, not 1–128|'z' is there twice"):
        unpack_reply(*found)
    with pytest.raises(WireError, match=r"characters, not 1–128|'z' is there twice"):
        unpack_task(scalars=found)
    longest = pb.Scalars(group="n" * 128, size=1, fp32=floats(1))
    assert list(unpack_reply(longest).scalars) == ["n" * 128]


def test_groups_of_a_message_are_limited() -> None:
    found = [pb.Scalars(group=f"{i}", size=1, fp32=floats(1)) for i in range(limits.MAX_GROUPS + 1)]
    assert len(unpack_reply(*found[1:]).scalars) == limits.MAX_GROUPS
    with pytest.raises(WireError, match=r"more than 64 entries of Reply\.scalars"):
        unpack_reply(*found)
    with pytest.raises(WireError, match=r"more than 64 entries of Task\.scalars"):
        unpack_task(scalars=found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_a_log_are_finite(bad: float) -> None:
    found = pb.Scalars(size=9, fp32=floats(1, bad), varint=b"\x03")
    with pytest.raises(WireError, match="log row 0 has a value that is not finite"):
        unpack_task(found)
    with pytest.raises(ValueError, match="log row 0 has a value that is not finite"):
        row = {"scalars": vector([1.0, bad])}
        messages.pack_task(replace(TASK, log=Log(ORIGIN, SINCE, VERSION, [row], 1000)))
    assert unpack_reply(pb.Scalars(group="z", size=1, fp32=floats(1, bad))).scalars


def test_rows_of_a_log_have_no_name() -> None:
    with pytest.raises(WireError, match="log row 0 has the name of a group"):
        unpack_task(pb.Scalars(group="z", size=1, fp32=floats(1)))


@pytest.mark.parametrize("bad", ["", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29])
def test_versions_of_a_log_are_hexadecimal(bad: str) -> None:
    for ids in ((bad, SINCE, VERSION), (ORIGIN, bad, VERSION), (ORIGIN, SINCE, bad)):
        log = Log(*ids)
        with pytest.raises(WireError, match="hexadecimal"):
            messages.unpack_task(messages.pack_task(replace(TASK, log=log)))


def test_an_empty_log_is_not_no_log() -> None:
    log = Log(ORIGIN, SINCE, VERSION, [])
    assert messages.unpack_task(messages.pack_task(replace(TASK, log=log))).log == log
    assert messages.unpack_task(messages.pack_task(TASK)).log is None
    with pytest.raises(WireError, match="hexadecimal"):
        unpack_task(log=pb.Log())


def test_a_log_is_limited_before_it_is_written_out() -> None:
    zeros = pb.Scalars(size=65536, fp32=b"", varint=b"")
    with pytest.raises(WireError, match="257 rows of 16842752 scalars"):
        unpack_task(*[zeros] * 257)
    with pytest.raises(WireError, match="1 rows of 4294967295 scalars"):
        unpack_task(pb.Scalars(size=2**32 - 1, fp32=b"", varint=b""))
    with pytest.raises(WireError, match=r"more than 65536 entries of Log\.rows"):
        unpack_task(*[pb.Scalars(size=1)] * 65537)
    with pytest.raises(ValueError, match="257 rows of 16842752 scalars"):
        row = {"scalars": torch.zeros(65536)}
        messages.pack_task(replace(TASK, log=Log(ORIGIN, SINCE, VERSION, [row] * 257, 1000)))


def test_headers_have_exact_limits() -> None:
    big = {"scalars": torch.ones(65536)}
    messages.pack_reply(replace(REPLY, scalars=dict.fromkeys("abc", big)))
    with pytest.raises(ValueError, match=r"header has .* at most 1048576"):
        messages.pack_reply(replace(REPLY, scalars=dict.fromkeys("abcd", big)))
    log = Log(ORIGIN, SINCE, VERSION, [big] * 31, 1000)
    assert len(messages.pack_task(replace(TASK, log=log)).header) <= limits.MAX_HEADER
    with pytest.raises(ValueError, match=r"header has .* at most 8388608"):
        messages.pack_task(replace(TASK, log=replace(log, rows=[big] * 32)))


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, "only scalars"),
        ({"seed": seed(1)}, "only scalars"),
        ({"scalars": ONES, "extra": ONES}, "only scalars"),
        ({"scalars": ONES.double()}, "float64 .*, not torch.float32 or torch.float16"),
        ({"scalars": ONES.bfloat16()}, "bfloat16"),
        ({"scalars": ONES.int()}, "int32"),
        ({"scalars": ONES[None]}, r"\(1, 200\)"),
        ({"scalars": ONES[0]}, r"\(\), not"),
        ({"scalars": torch.zeros(65537)}, "65537 scalars, at most 65536"),
        ({"scalars": ONES, "directions": torch.zeros(200)}, "directions is torch.float32"),
        ({"scalars": ONES, "directions": torch.zeros(200).long()}, "directions is torch.int64"),
        ({"scalars": ONES, "directions": torch.zeros(199).int()}, r"\(199,\), not"),
        ({"scalars": ONES[:1], "directions": vector([65536], torch.int32)}, "direction is not in"),
        ({"scalars": ONES[:1], "directions": vector([-1], torch.int32)}, "direction is not in"),
        ({"scalars": ONES, "seed": torch.tensor(1, dtype=torch.int32)}, "seed is torch.int32"),
        ({"scalars": ONES, "seed": seed(1)[None]}, "seed is .*1,"),
        ({"scalars": ONES, "seed": seed(-1)}, "seed -1 is not in"),
        ({"scalars": ONES, "seed": seed(2**32)}, "seed 4294967296 is not in"),
        ({"scalars": ONES, "step": torch.tensor(1.0).double()}, "step is torch.float64"),
        ({"scalars": ONES, "step": vector([1.0])}, "step is"),
        ({"scalars": ONES, "step": torch.tensor(math.nan)}, "step nan is not finite"),
    ],
)
def test_what_is_no_group_is_not_sent(params: Params, reason: str) -> None:
    for send in (
        lambda: messages.pack_task(replace(TASK, scalars={"z": params})),
        lambda: messages.pack_task(replace(TASK, log=Log(ORIGIN, SINCE, VERSION, [params], 1000))),
        lambda: messages.pack_reply(replace(REPLY, scalars={"z": params})),
        lambda: scalar_groups.scalar_bytes(params),
    ):
        with pytest.raises(ValueError, match=reason):
            send()


def test_names_that_would_be_refused_are_not_sent() -> None:
    for name in ("", "n" * 129):
        with pytest.raises(ValueError, match="not 1–128"):
            messages.pack_reply(replace(REPLY, scalars={name: {"scalars": ONES}}))
    with pytest.raises(ValueError, match="65 scalar groups"):
        many = {f"{i}": {"scalars": ONES} for i in range(65)}
        messages.pack_reply(replace(REPLY, scalars=many))


FORMS: Payload = {
    "dense": {"scalars": vector([1.0, -0.0, 2.0], torch.float16), "seed": seed(9)},
    "steps": {"scalars": vector([1.0, 2.0]), "directions": vector([7, 7], torch.int32)},
    "gaps": {"scalars": FAR, "step": torch.tensor(0.1)},
    "bits": {"scalars": vector([1.0, 0.0] * 8, torch.float16)},
}
FULL_TASK = replace(
    TASK, scalars=FORMS, log=Log(ORIGIN, SINCE, VERSION, list(FORMS.values()), 1000)
)
HEADERS = [
    messages.pack_task(FULL_TASK).header,
    messages.pack_reply(replace(REPLY, scalars=FORMS)).header,
]


@settings(max_examples=500)
@given(st.data())
def test_mutations_raise_nothing_else(data: st.DataObject) -> None:
    """And what is still read is a message that could have been sent."""
    is_reply = data.draw(st.integers(0, 1))
    header = bytearray(HEADERS[is_reply])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header)))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "end"])):
            case "flip" if at < len(header):
                header[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set" if at < len(header):
                header[at] = data.draw(st.integers(0, 255))
            case "cut":
                del header[at : at + data.draw(st.integers(1, 4))]
            case "insert":
                header[at:at] = data.draw(st.binary(min_size=1, max_size=5))
            case "repeat":
                header[at:at] = header[at : at + data.draw(st.integers(1, 60))]
            case "end":
                del header[max(at, 1) :]
    try:
        if is_reply:
            reply = messages.unpack_reply(Packet(bytes(header), b""), 0)
            assert same_reply(messages.unpack_reply(messages.pack_reply(reply), 0), reply)
        else:
            task = messages.unpack_task(Packet(bytes(header), b""))
            assert same_task(messages.unpack_task(messages.pack_task(task)), task)
    except WireError:
        return


fields_of = st.fixed_dictionaries(
    {"size": st.integers(0, 40) | st.sampled_from([65536, 65537, 2**32 - 1])},
    optional={
        "group": st.text(max_size=2),
        "fp32": st.binary(max_size=5).map(lambda b: b * 4),
        "fp16": st.binary(max_size=9),
        "fixed32": st.binary(max_size=5).map(lambda b: b * 4),
        "varint": st.binary(max_size=8),
        "bitmap": st.binary(max_size=5),
        "seed": st.integers(0, 2**32 - 1),
        "step": st.floats(width=32),
    },
)


@settings(max_examples=500)
@given(fields_of)
def test_groups_of_any_fields_raise_nothing_else(fields: dict[str, Any]) -> None:
    try:
        found = unpack_reply(pb.Scalars(**fields)).scalars
    except WireError:
        return
    for params in found.values():
        assert same_params(there_and_back(params), params)
