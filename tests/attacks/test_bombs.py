"""A message of a few MiB that takes hundreds once it is parsed: of empty entries of its fields.

Memory is that of a process which does nothing else.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.client.phone.meter import SessionOverError
from corolla.client.phone.session import Phone, Settings
from corolla.errors import WireError
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc, update_pb2
from corolla.server.gateway import service
from corolla.wire import messages, parsing
from corolla.wire.packet import Packet
from tests.server.gateway import gateways
from tests.server.gateway.callers import Caller
from tests.server.gateway.gateways import Clock, World

PROCESS = """
import sys
import psutil
from corolla.errors import WireError
from corolla.phones import protocol
from corolla.wire import parsing

def size():
    return psutil.Process().memory_info().rss >> 20

data, read = {
    "task": (b"\\x4a\\x00", protocol.read_task),
    "manifest": (b"\\x0a\\x00", protocol.read_manifest),
}[sys.argv[1]]
data *= 4 << 20
if sys.argv[2] == "open":
    parsing._Count.count = lambda *_: None
    protocol.MAX_FILES = len(data)
before, found = size(), None
try:
    found = read(data)
except WireError as error:
    found = error.__cause__ or error.__traceback__
print(size() - before)
"""
"""What prints the MiB by which 8 MiB of empty entries, once they are read, let a process grow."""


def grown(attack: str, defence: str) -> int:
    """MiB by which a process grows that reads the message."""
    made = subprocess.run(
        [sys.executable, "-c", PROCESS, attack, defence], capture_output=True, text=True, check=True
    )
    return int(made.stdout)


@pytest.mark.parametrize("attack", ["task", "manifest"])
def test_a_message_of_empty_entries_takes_no_memory(attack: str) -> None:
    assert grown(attack, "open") > 150
    assert grown(attack, "closed") < 20


def entries(kind: Any, field: str, number: int) -> bytes:
    """Empty entries of a field."""
    return bytes([kind.DESCRIPTOR.fields_by_name[field].number << 3 | 2, 0]) * number


def within(data: bytes, field: int) -> bytes:
    """A message of 1 to 2 MiB in a field of another."""
    size = len(data)
    return bytes([field << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + data


ROWS = within(entries(update_pb2.Log, "rows", 1 << 19), 11)
BOMBS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "Task.cached": (
        lambda data: messages.unpack_task(Packet(data, b"")),
        entries(update_pb2.Task, "cached", 1 << 19),
    ),
    "Log.rows": (lambda data: messages.unpack_task(Packet(data, b"")), ROWS),
    "Reply.missing": (
        lambda data: messages.unpack_reply(Packet(data, b""), 0),
        entries(update_pb2.Reply, "missing", 1 << 18),
    ),
    "Reply.metrics": (
        lambda data: protocol.read_reply(Packet(data, b"")),
        entries(update_pb2.Reply, "metrics", 1 << 18),
    ),
    "Bundle.entries": (
        lambda data: messages.unpack_bundle(data, 1000),
        entries(update_pb2.Bundle, "entries", 1 << 19),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_reads_a_message_of_a_peer_counts_before_it_parses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, data = BOMBS[name]
    with pytest.raises(WireError, match=f"entries of {name}"):
        read(data)
    monkeypatch.setattr(parsing._Count, "count", lambda *_: None)
    try:
        read(data)  # all of them are made
    except WireError as error:
        assert "entries" not in str(error)


def test_who_a_reply_says_it_is_from_is_not_parsed_for_either() -> None:
    bomb = update_pb2.Reply(client="eve").SerializeToString() + BOMBS["Reply.missing"][1]
    assert messages.peek_client(Packet(bomb[:105], b"")) == "eve"
    assert messages.peek_client(Packet(bomb, b"")) == ""


class Bomber(device_pb2_grpc.PhonesServicer):
    """A gateway whose lease has as many cached groups as a message holds."""

    def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInResponse:  # noqa: N802
        return pb.CheckInResponse(lease=pb.Lease(cached=[pb.Blob()] * 500_000))


class Idle:
    """A trainer that is never asked for more than how many examples it has."""

    def examples(self) -> int:
        return 60


def test_a_phone_counts_what_its_gateway_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    server = grpc.server(ThreadPoolExecutor(2))
    device_pb2_grpc.add_PhonesServicer_to_server(Bomber(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            settings = Settings("p1", "token", tmp_path, own_model=True)
            phone = Phone(settings, channel, Idle(), say=said.append)  # type: ignore[arg-type]
            with pytest.raises(SessionOverError, match=r"more than 4096 entries of Lease\.cached"):
                phone.visit()
            assert phone.caller.meter.spent().bytes > 1_000_000
            with monkeypatch.context() as open_door:
                open_door.setattr(parsing._Count, "count", lambda *_: None)
                request = pb.CheckInRequest()
                found = phone.caller.call(phone.caller.stub.CheckIn, request)
                assert len(found.lease.cached) == 500_000
    finally:
        server.stop(None).wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, Clock(), seats=4) as found:
        yield found


def test_a_gateway_counts_what_phones_tell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pb.CheckInRequest(native=pb.Native(timings=[pb.Timing()] * 500_000))
    parsed: list[int] = []

    def counted(message: Any, data: bytes, most: int) -> Any:
        found = parsing.parse(message, data, most)
        parsed.append(len(found.native.timings))
        return found

    monkeypatch.setattr(service, "parse", counted)
    phone = Caller(world)
    with pytest.raises(grpc.RpcError) as caught:
        phone.call("CheckIn", bomb)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "message has more than 1024 entries of Native.timings"
    assert parsed == []
    monkeypatch.setattr(parsing._Count, "count", lambda *_: None)
    phone.call("CheckIn", bomb)
    assert parsed == [500_000]
    phone.channel.close()
