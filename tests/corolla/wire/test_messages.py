import io
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.wire import limits, messages
from corolla.wire.messages import Kind, Reply, Task
from corolla.wire.packet import Packet, from_flower, to_flower

if TYPE_CHECKING:
    from flwr.app import RecordDict

ROOT = Path(__file__).resolve().parent.parent.parent.parent
RUN, ID = "0123456789abcdef" * 2, "fedcba9876543210" * 2
REPLY = Reply(
    RUN, 7, "v" * 64, Kind.TRAIN, "Ängström/日本 <b>", 12, {"loss": 0.5}, b"payload", missing=[]
)

texts = st.text(st.characters(codec="utf-8"), max_size=12)
kinds = st.sampled_from(list(Kind))


@given(
    st.builds(
        Task,
        run_id=st.just(RUN),
        round=st.integers(0, 2**32 - 1),
        base_version=texts,
        kind=kinds,
        config=texts,
        cached=st.dictionaries(texts, st.just(ID), max_size=3),
        payload=st.binary(max_size=40),
    )
)
def test_every_task_comes_back(task: Task) -> None:
    assert messages.unpack_task(messages.pack_task(task)) == task


@given(
    st.builds(
        Reply,
        run_id=texts,
        round=st.integers(0, 2**32 - 1),
        base_version=texts,
        kind=kinds,
        client=texts,
        num_examples=st.integers(0, 2**40),
        metrics=st.dictionaries(texts, st.floats(-1e30, 1e30)),
        payload=st.binary(max_size=40),
        error=st.text("abc", max_size=9),
        missing=st.lists(texts, max_size=3),
    )
)
def test_every_reply_comes_back(reply: Reply) -> None:
    assert messages.unpack_reply(messages.pack_reply(reply), 40) == reply


def header(**changes: Any) -> pb.Reply:
    head = pb.Reply()
    head.ParseFromString(messages.pack_reply(REPLY).header)
    for name, value in changes.items():
        setattr(head, name, value)
    return head


def unpack(head: pb.Reply, payload: bytes = b"payload") -> Reply:
    return messages.unpack_reply(Packet(head.SerializeToString(), payload), 100)


def test_a_header_that_is_right_passes() -> None:
    assert unpack(header()) == REPLY


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 0}, "schema 0"),
        ({"schema": 1}, "schema 1"),
        ({"schema": 2}, "schema 2"),
        ({"schema": 4}, "schema 4"),
        ({"kind": 0}, "kind"),
        ({"kind": 9}, "kind"),
        ({"payload_bytes": 8}, "7 bytes, header 8"),
        ({"payload_bytes": 2**63}, "7 bytes"),
        ({"payload_sha256": ""}, "checksum"),
        ({"payload_sha256": "0" * 64}, "checksum"),
        ({"num_examples": 2**40 + 1}, "examples"),
        ({"num_examples": 2**64 - 1}, "examples"),
    ],
)
def test_a_header_that_lies_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        unpack(header(**changes))


@given(st.integers(0, 8 * 7 - 1))
def test_a_flipped_bit_of_the_payload_is_noticed(bit: int) -> None:
    payload = bytearray(b"payload")
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError, match="checksum"):
        unpack(header(), bytes(payload))


@given(st.binary(max_size=60))
def test_a_random_header_is_refused(data: bytes) -> None:
    for read in (messages.unpack_task, lambda packet: messages.unpack_reply(packet, 100)):
        with pytest.raises(WireError):
            read(Packet(data, b""))


@given(
    st.sets(st.integers(0, 8 * len(messages.pack_reply(REPLY).header) - 1), min_size=1, max_size=3)
)
def test_flipped_bits_of_a_header_never_raise_anything_else(bits: set[int]) -> None:
    data = bytearray(messages.pack_reply(REPLY).header)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    try:
        reply = messages.unpack_reply(Packet(bytes(data), b"payload"), 100)
    except WireError:
        return
    assert 0 <= reply.num_examples <= 2**40
    assert all(math.isfinite(value) for value in reply.metrics.values())


def test_size_limits_are_exact() -> None:
    packet = messages.pack_reply(REPLY)
    assert messages.unpack_reply(packet, len(REPLY.payload)).payload == b"payload"
    with pytest.raises(WireError, match="at most 6"):
        messages.unpack_reply(packet, 6)
    with pytest.raises(WireError, match="header has"):
        messages.unpack_reply(Packet(b"\x00" * (limits.MAX_REPLY_HEADER + 1), b""), 100)
    with pytest.raises(WireError, match="header has"):
        messages.unpack_task(Packet(b"\x00" * (limits.MAX_HEADER + 1), b""))


def test_metrics_are_limited_in_number_and_name() -> None:
    for metrics, passes in (
        ({f"m{i}": 1.0 for i in range(limits.MAX_METRICS)}, True),
        ({f"m{i}": 1.0 for i in range(limits.MAX_METRICS + 1)}, False),
        ({"n" * limits.MAX_NAME: 1.0}, True),
        ({"n" * (limits.MAX_NAME + 1): 1.0}, False),
    ):
        packet = messages.pack_reply(Reply(RUN, 1, "v", Kind.TRAIN, "c", 1, metrics))
        if passes:
            assert messages.unpack_reply(packet, 0).metrics == metrics
        else:
            with pytest.raises(WireError, match="metrics"):
                messages.unpack_reply(packet, 0)


def test_metrics_that_are_not_finite_are_dropped_on_both_sides() -> None:
    bad = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    packed = messages.pack_reply(Reply(RUN, 1, "v", Kind.TRAIN, "c", 1, {**bad, "loss": 1.5}))
    assert messages.unpack_reply(packed, 0).metrics == {"loss": 1.5}
    hostile = header()
    hostile.metrics.update(bad)
    found = unpack(hostile)
    assert found.metrics == {"loss": 0.5}
    assert found.payload == b"payload"


def test_an_error_is_cut() -> None:
    long = "x" * 5000
    assert unpack(header(error=long)).error == "x" * 2000
    packet = messages.pack_reply(Reply(RUN, 1, "v", Kind.TRAIN, "c", error=long))
    assert messages.unpack_reply(packet, 0).error == "x" * 2000


@pytest.mark.parametrize("bad", ["", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29, "é" * 32])
def test_ids_of_a_task_are_hexadecimal(bad: str) -> None:
    """They become names of files and folders on a device."""
    with pytest.raises(WireError, match="hexadecimal"):
        messages.unpack_task(messages.pack_task(Task(bad, 1, "v", Kind.TRAIN, "")))
    with pytest.raises(WireError, match="hexadecimal"):
        messages.unpack_task(messages.pack_task(Task(RUN, 1, "v", Kind.TRAIN, "", {"A": bad})))


def test_cached_groups_of_a_task_are_limited() -> None:
    def task(number: int) -> Packet:
        cached = {f"{i}": ID for i in range(number)}
        return messages.pack_task(Task(RUN, 1, "v", Kind.TRAIN, "", cached))

    assert len(messages.unpack_task(task(limits.MAX_CACHED)).cached) == limits.MAX_CACHED
    with pytest.raises(WireError, match=r"entries of Task\.cached"):
        messages.unpack_task(task(limits.MAX_CACHED + 1))


@pytest.mark.parametrize("payload", [b"", b"\x00", bytes(range(256)) * 5])
def test_packets_travel_in_flower_records(payload: bytes) -> None:
    packet = messages.pack_reply(Reply(RUN, 1, "v", Kind.TRAIN, "c", 3, {"loss": 1.0}, payload))
    records = to_flower(packet)
    assert from_flower(records, len(payload)) == packet


def records(data: bytes, **changes: Any) -> "RecordDict":
    """Flower records whose array holds any bytes."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    fields: dict[str, Any] = {"dtype": "uint8", "shape": (1,), "stype": "numpy.ndarray"}
    found = RecordDict({"header": ConfigRecord({"packet": b"header"})})
    found["payload"] = ArrayRecord({"packet": Array(**{**fields, **changes}, data=data)})
    return found


def npy(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def described(descr: str, shape: object, data: bytes = b"") -> bytes:
    return npy(repr({"descr": descr, "fortran_order": False, "shape": shape}), data)


def saved(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    if "npz" in arrays:
        np.savez(buffer, arrays["npz"])
    else:
        np.save(buffer, arrays["npy"], allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
        b"PK\x03\x04junk",
        saved(npz=np.zeros(3)),
        saved(npy=np.array([{"a": 1}], dtype=object)),
        saved(npy=np.zeros(3)),
        saved(npy=np.zeros((2, 2), dtype=np.uint8)),
        saved(npy=np.zeros(3, dtype=">i4")),
        saved(npy=np.array("text")),
        saved(npy=np.zeros(9, dtype=np.uint8))[:-1],
        described("|u1", (4 << 40,)),
        described("|u1", (1 << 30,)),
        described("|u1", (1 << 70,)),
        described("|u1", (-5,)),
        npy("((("),
        npy("  a\n b"),
        npy("(" * 5000),
        b"\x93NUMPY\x09\x00aa",
        b"\x93NUMPY",
    ],
    ids=lambda data: repr(data[:14]) + str(len(data)),
)
def test_arrays_that_are_no_packet_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        from_flower(records(data), 1 << 20)


@given(st.binary(max_size=40), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04"]))
def test_random_arrays_are_refused(data: bytes, magic: bytes) -> None:
    with pytest.raises(WireError):
        from_flower(records(magic + data), 1 << 20)


def test_an_array_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="at most 10"):
        from_flower(records(b"\x93NUMPY" + b"\x00" * 5000), 10)


def test_other_records_are_refused() -> None:
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    for found in (
        RecordDict({}),
        RecordDict({"header": MetricRecord({"packet": 1})}),
        RecordDict({"header": ConfigRecord({"other": b"x"})}),
        RecordDict({"header": ConfigRecord({"packet": "text"})}),
        records(b"x", stype="other"),
    ):
        with pytest.raises(WireError):
            from_flower(found, 100)


def test_the_generated_code_is_what_the_schema_gives(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-Icorolla/proto=proto"),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", "corolla/proto/update.proto"),
        ],
        cwd=ROOT,
        check=True,
    )
    for name in ("update_pb2.py", "update_pb2.pyi"):
        fresh = (tmp_path / "corolla" / "proto" / name).read_text()
        assert (ROOT / "proto" / name).read_text() == fresh, "run `make proto`"


def test_the_limits_are_those_the_schema_promises() -> None:
    text = (ROOT / "proto" / "update.proto").read_text()
    assert (limits.MAX_HEADER, limits.MAX_REPLY_HEADER) == (8 << 20, 1 << 20)
    assert "at most 8 MiB of a task, 1 MiB of a reply" in text
    assert f"at most {limits.MAX_GROUPS}, names of 1 to {limits.MAX_NAME} characters" in text
    assert f"at most {limits.MAX_SCALARS}, directions below {limits.MAX_SCALARS}" in text
    assert f"at most {limits.MAX_ROWS} rows, of {limits.MAX_LOG_SCALARS} scalars" in text
    assert f"version of this file: {messages.SCHEMA}" in text
    assert f"at most {limits.MAX_CACHED} ids" in text
    assert f"at most {limits.MAX_METRICS} entries, names of at most {limits.MAX_NAME}" in text
    assert f"at most {limits.MAX_ERROR} characters" in text
    assert dict(pb.Kind.items()) == {"KIND_UNSPECIFIED": 0, **{f"KIND_{k.name}": k for k in Kind}}
