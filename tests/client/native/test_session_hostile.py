"""A native phone under limits of a day, and a gateway that wants all of it.

As tests/attacks/test_hostile_gateway.py, with the program itself: the gateway counts what comes.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from tests.attacks.test_hostile_gateway import AT_ONCE, JUNK, Gateway, Moving
from tests.client.native.fake_gateway import Fake, make_bundle, offering, serving
from tests.client.native.phones import FILES, Running, World, a_task
from tests.server.gateway import gateways

PROGRAM = "corolla-phone"
MIB = protocol.CHUNK
MANY = 1 << 22  # parameters of an adapter: a task may have 128 MiB of them


class Hostile(Gateway):
    """The gateway of Python's test, for native phones: an adapter's size bounds them."""

    def __init__(self, mode: str, seconds: float = 0.0) -> None:
        super().__init__(mode, Moving(), seconds)
        self.size = 100 * MIB
        self.blobs: dict[str, bytes] = {}
        self.never = threading.Event()
        self.gaps: list[float] = []
        self.answered: float | None = None

    def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInResponse:  # noqa: N802
        if self.answered is not None:
            self.gaps.append(time.monotonic() - self.answered)
        found = super().CheckIn(request, context)
        if self.mode == "model":
            found.refusal.base_model.CopyFrom(self.unsigned())
        if found.HasField("lease"):
            found.lease.payload.size = self.size
            found.lease.assignment.CopyFrom(
                pb.Assignment(program="fp32", method="grad", rank=1, length=32)
            )
        self.answered = time.monotonic()
        return found

    def Download(self, request: pb.DownloadRequest, context: Any) -> pb.Chunk:  # noqa: N802
        self.never.wait(self.seconds)
        if (data := self.blobs.get(request.sha256)) is not None:
            piece = data[request.offset :][:MIB]
            self.bytes += len(piece)
            return protocol.chunk(piece, request.offset, len(data))
        self.bytes += len(JUNK)
        if self.mode == "failing":
            context.set_code(grpc.StatusCode.UNAVAILABLE)
        return protocol.chunk(JUNK, request.offset, self.size)

    def unsigned(self) -> pb.Blob:
        """Another bundle each time: as much of it as comes before its signature is looked at."""
        made = pb.Manifest()
        files = {"manifest.json": 16 * MIB, "manifest.sig": 64, f"{self.calls}.pte": 5}
        for name, size in files.items():
            data = bytes(size)
            chunks = b"".join(
                hashlib.sha256(data[at : at + MIB]).digest() for at in range(0, size, MIB)
            )
            made.files.append(pb.Manifest.File(path=name, blob=self.put(data), chunks=chunks))
        return self.put(made.SerializeToString())

    def put(self, data: bytes) -> pb.Blob:
        self.blobs[protocol.sha256(data)] = data
        return pb.Blob(sha256=protocol.sha256(data), size=len(data))


@contextmanager
def hostile(world: World, gateway: Gateway) -> Iterator[str]:
    """The address of a gateway with the certificates of the world's."""
    with serving(gateway, world.folder / "certs") as port:
        yield f"localhost:{port}"


@pytest.fixture
def large(offered: World) -> World:
    """A phone's world with a bundle of an adapter of many parameters, which it has."""
    shapes = [{"name": "m.lora_A", "shape": [1, MANY]}, {"name": "m.lora_B", "shape": [2, 1]}]
    files = {name: data[:100] for name, data in FILES.items()}
    offered.fake.bundle = make_bundle(offered.folder / "large", files, offered.key, adapter=shapes)
    offered.fake.share(offered.fake.bundle)
    phone = offered.start(once=True)
    assert phone.finish() == 0, phone.errors
    return offered


def attacked(world: World, gateway: Gateway, **limits: object) -> Running:
    """A phone that the gateway has until its limits of a day end that; then another process."""
    with hostile(world, gateway) as address:
        for _ in range(2):
            phone = world.start(program=PROGRAM, gateway=address, **limits)
            phone.says("used up", 60)
            phone.kill()
    return phone


@pytest.mark.parametrize("mode", ["lease", "model"])
def test_no_byte_comes_beyond_those_of_a_day(large: World, mode: str) -> None:
    gateway = Hostile(mode)
    phone = attacked(large, gateway, daily_bytes="50MB", daily_seconds=8, retry_seconds="0.01,0.02")
    assert gateway.bytes <= 51_000_000
    assert sum(line["seconds"] for line in large.history()) <= 16
    told = {"waiting: today's bytes are used up", "waiting: today's time is used up"}
    assert phone.lines[-1] in told
    assert gateway.bytes > 5_000_000 or "time" in phone.lines[-1]


@pytest.mark.parametrize("mode", ["lease", "model"])
def test_no_second_comes_beyond_those_of_a_day(large: World, mode: str) -> None:
    """A call that is under way when the time ends may take a second more."""
    gateway = Hostile(mode, seconds=0.25)
    phone = attacked(large, gateway, daily_seconds=2, retry_seconds="0.01,0.02")
    assert gateway.seconds * gateway.bytes / MIB <= 3
    assert phone.lines[-1] == "waiting: today's time is used up"


def test_a_chunk_that_comes_with_a_failure_counts(large: World) -> None:
    gateway = Hostile("failing")
    attacked(large, gateway, daily_bytes="5MB", retry_seconds="0.01,0.02")
    assert gateway.bytes <= 6_000_000


def test_a_gateway_whose_lease_used_up_the_day_is_told_so(large: World) -> None:
    gateway = Hostile("lease")
    attacked(large, gateway, daily_bytes="5MB")
    assert gateway.words[0] == "given up: today's bytes are used up"


def test_nobody_makes_a_phone_call_without_a_pause(offered: World) -> None:
    gateway = Hostile("spin")
    with hostile(offered, gateway) as address:
        phone = offered.start(program=PROGRAM, gateway=address, retry_seconds="0.2,0.3")
        gateways.until(lambda: len(gateway.gaps) > 3)
        phone.kill()
    assert min(gateway.gaps) > 0.39


def test_visits_that_come_to_nothing_use_up_the_day_as_well(offered: World) -> None:
    gateway = Hostile("spin")
    attacked(offered, gateway, daily_bytes="10KB", retry_seconds="0.01,0.02")
    assert 5 < gateway.calls < 100


class Chatty(Fake):
    """Answers each heartbeat with much that nobody asked for, which a parser keeps."""

    beats = 0

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        self.beats += 1
        unknown = bytes([15 << 3 | 2]) + b"\xc0\x9a\x0c" + bytes(200_000)
        known = super().Heartbeat(request, context).SerializeToString()
        return pb.HeartbeatResponse.FromString(known + unknown)


def test_a_wait_for_an_unmetered_network_is_on_the_meter_as_well(offered: World) -> None:
    """The reply is there, but the network is metered: heartbeats go on only as the day allows."""
    assert offered.start(once=True).finish() == 0  # has the bundle
    spent = sum(line["bytes"] for line in offered.history())
    senses = offered.script("senses", [{"after": 0}])

    def leased(name: str, context: grpc.ServicerContext) -> None:
        if name == "CheckIn":
            offered.script("senses", [{"after": 0, "metered": True}])

    chatty = Chatty(offered.bundle, [a_task()], policy=pb.Policy(unmetered=True), before=leased)
    chatty.lease_seconds, chatty.deadline = 0.3, 600.0
    with offering(offered.folder, chatty) as port:
        phone = offered.start(
            {"passes": 0},
            gateway=f"localhost:{port}",
            platform=f"script:{senses}",
            daily_bytes=str(int(spent) + 1_000_000),
        )
        phone.says("used up", 60)
        phone.kill()
    assert 3 < chatty.beats <= 6
    assert chatty.reports[0][1].error == "given up: today's bytes are used up"


class Bomber(Hostile):
    """Answers with as many empty entries as a message holds, or lists as many files."""

    def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInResponse:  # noqa: N802
        if self.mode == "groups":
            return pb.CheckInResponse(lease=pb.Lease(cached=[pb.Blob()] * 500_000))
        model = self.put(b"\x0a\x00" * (8 * MIB))
        refusal = pb.Refusal(reason=pb.Refusal.REASON_MODEL, base_model=model)
        return pb.CheckInResponse(refusal=refusal, retry=AT_ONCE)


@pytest.mark.parametrize(
    ("mode", "why"), [("groups", "more than 4096 cached groups"), ("files", "more than 1024 files")]
)
def test_a_message_of_empty_entries_takes_no_memory_of_a_phone(
    offered: World, mode: str, why: str
) -> None:
    with hostile(offered, Bomber(mode)) as address:
        phone = offered.start(program=PROGRAM, gateway=address)
        phone.says(why, 60)
        status = Path(f"/proc/{phone.process.pid}/status").read_text().split()
        phone.kill()
        assert int(status[status.index("VmHWM:") + 1]) * 1024 < 80_000_000  # of these 20 MB idle
        once = offered.start(program=PROGRAM, gateway=address, once=True)
        assert once.finish() == 1
    assert why in once.errors
