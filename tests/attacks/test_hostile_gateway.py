"""A gateway that wants all of a phone: its bytes, its time, its answers without a pause.

The phone's owner has set limits of a day; they hold whatever the gateway says, in this process and
in the next. The time is a clock's that goes on with the gateway's answers.
"""

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import pytest

from corolla.client.phone.clock import Clock
from corolla.client.phone.policies import Limits
from corolla.client.phone.session import Phone, Settings
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc, update_pb2
from corolla.storage.disk import USUAL, DiskLimits

JUNK = bytes(protocol.CHUNK)
HUGE = 8 << 30
MANIFEST = pb.Manifest(
    files=[
        pb.Manifest.File(
            path="model.safetensors",
            blob=pb.Blob(sha256="ab" * 32, size=1 << 30),
            chunks=hashlib.sha256(JUNK).digest() * 1024,
        )
    ]
).SerializeToString()
NAME = hashlib.sha256(MANIFEST).hexdigest()
ANY = DiskLimits(1 << 40, 1 << 41)
FEW = Limits(daily_bytes=5_000_000)
AT_ONCE = pb.RetryWindow(min_seconds=0, max_seconds=0)


class Moving(Clock):
    """Stands still but for waits, which are over at once, and for what a gateway makes of it."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.at

    def wait(self, event: Event, seconds: float) -> bool:
        if seconds == 1e9 / 3:  # between two heartbeats of the hostile lease
            return event.wait()
        self.waits.append(seconds)
        self.at += seconds
        return event.is_set()


class Gateway(device_pb2_grpc.PhonesServicer):
    """Does not end. Each chunk it sends takes `seconds`."""

    def __init__(self, mode: str, clock: Moving, seconds: float) -> None:
        self.mode, self.clock, self.seconds = mode, clock, seconds
        self.bytes, self.calls = 0, 0
        self.words: list[str] = []
        self.leases = itertools.count(1)

    def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInResponse:  # noqa: N802
        self.calls += 1
        if self.mode == "spin":
            refusal = pb.Refusal(reason=pb.Refusal.REASON_NO_TASK, text="no round")
            return pb.CheckInResponse(refusal=refusal, retry=AT_ONCE)
        if self.mode == "model":
            model = pb.Blob(sha256=NAME, size=len(MANIFEST))
            refusal = pb.Refusal(reason=pb.Refusal.REASON_MODEL, base_model=model)
            return pb.CheckInResponse(refusal=refusal, retry=AT_ONCE)
        id = f"{next(self.leases):032x}"
        task = update_pb2.Task(
            schema=3, run_id=id, round=1, base_version="v", kind=update_pb2.KIND_TRAIN, config="{}"
        ).SerializeToString()
        digest = hashlib.sha256(task).hexdigest()
        lease = pb.Lease(
            id=id,
            client=f"g/{request.device}",
            task=pb.Blob(sha256=digest, size=len(task), inline=task),
            payload=pb.Blob(sha256="cd" * 32, size=HUGE),
            strategy="fedavg",
            phase="train",
            seconds=1e9,
            deadline_seconds=1e9,
            max_upload_bytes=1 << 40,
        )
        return pb.CheckInResponse(lease=lease, retry=AT_ONCE)

    def Download(self, request: pb.DownloadRequest, context: Any) -> pb.Chunk:  # noqa: N802
        self.calls += 1
        self.clock.at += self.seconds
        data, size = JUNK, HUGE if self.mode == "lease" else 1 << 30
        if request.sha256 == NAME:
            data, size = MANIFEST[request.offset :][: protocol.CHUNK], len(MANIFEST)
        self.bytes += len(data)
        return protocol.chunk(data, request.offset, size)

    def Report(self, request: pb.ReportRequest, context: Any) -> pb.Acknowledgement:  # noqa: N802
        self.words.append(update_pb2.Reply.FromString(request.reply).error)
        return pb.Acknowledgement(why="more")

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        return pb.HeartbeatResponse(wanted=True, seconds=1e9)


class Trainer:
    """Has examples, and holds no group."""

    def examples(self) -> int:
        return 60

    def missing(self, run_id: str, groups: Any) -> list[str]:
        return list(groups)


class World:
    """A hostile gateway, and phones of one device that it has."""

    def __init__(self, folder: Path, gateway: Gateway, clock: Moving, port: int) -> None:
        self.folder, self.gateway, self.clock, self.port = folder, gateway, clock, port
        self.said: list[str] = []

    def visits(self, number: int, limits: Limits, disk: DiskLimits = ANY) -> list[float]:
        """The pauses after so many visits of a new process."""
        own = self.gateway.mode != "model"
        settings = Settings("p1", "token", self.folder, own_model=own, limits=limits, disk=disk)
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            phone = Phone(settings, channel, Trainer(), say=self.said.append, clock=self.clock)  # type: ignore[arg-type]
            return [phone.visit() for _ in range(number)]


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    mode, seconds = request.param
    clock = Moving()
    gateway = Gateway(mode, clock, seconds)
    server = grpc.server(ThreadPoolExecutor(8))
    device_pb2_grpc.add_PhonesServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield World(tmp_path, gateway, clock, port)
    server.stop(None).wait()


@pytest.mark.parametrize("world", [("lease", 0.0), ("model", 0.0)], indirect=True)
def test_no_byte_comes_beyond_those_of_a_day(world: World) -> None:
    limits = Limits(daily_bytes=5_000_000)
    world.visits(2, limits)
    assert 3_900_000 < world.gateway.bytes <= 5_000_000
    world.visits(2, limits)  # of another process
    assert world.gateway.bytes <= 5_000_000
    assert world.said[-1] == "waiting: today's bytes are used up"


@pytest.mark.parametrize("world", [("lease", 0.7), ("model", 0.7)], indirect=True)
def test_no_second_comes_beyond_those_of_a_day(world: World) -> None:
    limits, began = Limits(daily_seconds=8.0), world.clock.at
    world.visits(2, limits)
    assert 7 < world.clock.at - began <= 9
    calls = world.gateway.calls
    world.visits(2, limits)
    assert world.gateway.calls == calls
    assert world.said[-1] == "waiting: today's time is used up"


@pytest.mark.parametrize("world", [("lease", 0.0)], indirect=True)
def test_a_gateway_whose_lease_used_up_the_day_is_told_so(world: World) -> None:
    world.visits(1, Limits(daily_bytes=3_000_000))
    assert world.gateway.words == ["given up: today's bytes are used up"]


@pytest.mark.parametrize("world", [("spin", 0.0), ("lease", 0.0), ("model", 0.0)], indirect=True)
def test_nobody_makes_a_phone_call_without_a_pause(world: World) -> None:
    pauses = world.visits(2, Limits(daily_bytes=5_000_000))
    assert all(pause >= 2.0 for pause in pauses)


@pytest.mark.parametrize("world", [("spin", 0.0)], indirect=True)
def test_visits_that_come_to_nothing_use_up_the_day_as_well(world: World) -> None:
    world.visits(300, Limits(daily_bytes=10_000))
    assert 20 < world.gateway.calls < 290
    assert world.said[-1] == "waiting: today's bytes are used up"


@pytest.mark.parametrize("world", [("lease", 0.0)], indirect=True)
def test_no_byte_is_downloaded_that_the_disk_has_no_room_for(world: World) -> None:
    world.visits(1, FEW, USUAL)
    assert world.gateway.bytes == 0
    why = "the run would keep 8.6 GB on this device's disk, its owner allows 2.0 GB (--run-disk)"
    assert world.gateway.words == [why]
    assert why in world.said
    assert not list(world.folder.glob("*.part"))
    world.visits(1, FEW, ANY)
    assert world.gateway.bytes > 3_900_000


@pytest.mark.parametrize("world", [("model", 0.0)], indirect=True)
def test_a_base_model_that_the_disk_has_no_room_for_is_refused(world: World) -> None:
    world.visits(1, FEW, DiskLimits(run=1 << 28, whole=1 << 29))
    assert world.gateway.bytes == len(MANIFEST)
    assert world.said == [
        "the gateway's base model is refused: it has 1.1 GB, the owner of this device allows "
        "268.4 MB (--disk, without --run-disk)"
    ]
    world.visits(1, FEW, ANY)
    assert world.gateway.bytes > 3_900_000
