"""The limits of device.proto, and payloads put together without torch."""

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import ConfigError, WireError
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.wire import codec, messages
from corolla.wire.messages import Kind, Task
from corolla.wire.packet import Packet
from corolla.wire.parsing import parse


def group(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3, seed + 1, generator=generator),
        "y": torch.arange(seed, dtype=torch.int32),
        "z": torch.randn(5, generator=generator).bfloat16(),
    }


def test_payloads_are_joined_bit_by_bit() -> None:
    groups = {"a": group(1), "c": group(2), "empty": {}, "d": group(3)}
    buffers = [codec.encode({name: own}) for name, own in groups.items()]
    found = codec.decode(protocol.join(buffers))
    assert list(found) == list(groups)
    for name, own in groups.items():
        assert found[name].keys() == own.keys()
        for key, tensor in own.items():
            assert found[name][key].dtype == tensor.dtype
            assert torch.equal(found[name][key], tensor)


def test_a_task_with_groups_is_one_that_a_client_reads() -> None:
    payload = codec.encode({"head": group(1)})
    told = Task("0" * 32, 3, "v", Kind.TRAIN, "{}", {"b": "1" * 32}, payload)
    header = protocol.read_task(messages.pack_task(told).header)
    packet = protocol.with_groups(header, payload, [codec.encode({"b": group(2)})])
    task = messages.unpack_task(packet)
    assert (task.round, task.cached) == (3, {"b": "1" * 32})
    assert messages.content(task).keys() == {"head", "b"}
    alone = protocol.with_groups(header, b"", [codec.encode({"b": group(2)})])
    assert messages.content(messages.unpack_task(alone)).keys() == {"b"}
    assert protocol.with_groups(header, payload, []).payload == payload


@pytest.mark.parametrize(
    "buffer",
    [b"", b"\0" * 8, b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"{}"],
)
def test_what_is_no_payload_is_not_joined(buffer: bytes) -> None:
    with pytest.raises(WireError):
        protocol.join([codec.encode({"a": group(1)}), buffer])


def test_a_group_that_is_there_twice_is_not_joined() -> None:
    own = codec.encode({"a": group(1)})
    with pytest.raises(WireError, match="twice"):
        protocol.join([own, own])


def test_a_reply_to_a_task_that_was_given_up_is_one_that_a_server_reads() -> None:
    task = Task("0" * 32, 3, "version", Kind.TRAIN, "{}")
    header = protocol.read_task(messages.pack_task(task).header)
    reply = messages.unpack_reply(protocol.given_up(header, "gate/p1", "not charging\nany more"), 0)
    assert (reply.run_id, reply.round, reply.base_version) == ("0" * 32, 3, "version")
    assert (reply.kind, reply.client, reply.error) == (
        Kind.TRAIN,
        "gate/p1",
        "not charging any more",
    )


@pytest.mark.parametrize(
    "changes",
    [{"offset": 1}, {"size": 9}, {"content": b""}, {"content": b"0123456789x"}, {"crc32": 0}],
)
def test_a_chunk_that_is_not_the_one_asked_for_is_refused(changes: dict[str, Any]) -> None:
    chunk = protocol.chunk(b"0123456789", 0, 10)
    assert protocol.check_chunk(chunk, 0, 10) == b"0123456789"
    for key, value in changes.items():
        setattr(chunk, key, value)
    with pytest.raises(WireError):
        protocol.check_chunk(chunk, 0, 10)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/config.json",
        "../config.json",
        "a/../config.json",
        "a//b.json",
        "./a.json",
        ".a.json",
        "a\\b.json",
        "a b.json",
        "model.bin",
        "model.py",
        "model",
        "a" * 201 + ".json",
        "a\x00.json",
    ],
)
def test_a_manifest_cannot_lead_out_of_its_folder_or_bring_code(path: str) -> None:
    file = pb.Manifest.File(path=path, blob=pb.Blob(sha256="0" * 64, size=1), chunks=b"c" * 32)
    with pytest.raises(WireError):
        protocol.read_manifest(pb.Manifest(files=[file]).SerializeToString())


@pytest.mark.parametrize(
    ("blob", "chunks"),
    [
        ({"sha256": "0" * 63, "size": 1}, 1),
        ({"sha256": "0" * 64, "size": 1}, 0),
        ({"sha256": "0" * 64, "size": 1 << 21}, 1),
        ({"sha256": "0" * 64, "size": 1 << 40}, 1),
        ({"sha256": "0" * 64, "size": 2, "inline": b"12"}, 1),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(blob: dict[str, Any], chunks: int) -> None:
    file = pb.Manifest.File(path="config.json", blob=pb.Blob(**blob), chunks=b"c" * 32 * chunks)
    with pytest.raises(WireError):
        protocol.read_manifest(pb.Manifest(files=[file]).SerializeToString())


def test_a_manifest_has_files_and_none_twice() -> None:
    digest = hashlib.sha256(b"x").digest()
    blob = pb.Blob(sha256=digest.hex(), size=1)
    file = pb.Manifest.File(path="config.json", blob=blob, chunks=digest)
    for files in ([], [file, file]):
        with pytest.raises(WireError):
            protocol.read_manifest(pb.Manifest(files=files).SerializeToString())
    assert protocol.read_manifest(pb.Manifest(files=[file]).SerializeToString()).files[0] == file


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (10, 30, 15.0),
        (0, 0, 0.0),
        (30, 10, 18.75),
        (-1, 5, 18.75),
        (0, 1000000000.0, 18.75),
        (float("nan"), 5, 18.75),
        (0, float("inf"), 18.75),
    ],
)
def test_a_wait_lies_in_its_window_and_an_absurd_window_is_not_obeyed(
    low: float, high: float, expected: float
) -> None:
    assert protocol.wait(protocol.window(low, high), 0.25) == expected


@pytest.mark.parametrize("text", ["host", "host:", ":1", "https://host:1", "host:99999", "h:1:2"])
def test_an_address_is_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match="--listen: expected HOST:PORT"):
        protocol.check_address("--listen", text)


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_no_bytes_of_a_peer_raise_anything_but_wire_errors(data: bytes, more: bytes) -> None:
    for read in (
        lambda: protocol.read_task(data),
        lambda: protocol.read_reply(Packet(data, more)),
        lambda: protocol.read_manifest(data),
        lambda: protocol.join([data, more]),
        lambda: parse(pb.CheckInResponse(), data, 100),
    ):
        try:
            read()
        except WireError as error:
            assert "\n" not in str(error)
