"""Phones of tests by hand: one call after another, to a gateway whose round is in progress."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
import torch

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc, update_pb2
from corolla.wire import messages
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet
from corolla.wire.rpc import FOREVER, Waits
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World
from tests.strategies import tiny

CONFIG = tiny.config("fedavg", rank=1, alpha=1.0, deadline=30.0)
ABLE = update_pb2.Capabilities(charging=True, idle=True)


@dataclass
class Caller:
    """Calls of one device, by hand."""

    world: World
    device: str = "p1"
    token: str = gateways.TOKEN

    def __post_init__(self) -> None:
        self.channel = self.world.channel()
        self.stub: Any = device_pb2_grpc.PhonesStub(self.channel)  # type: ignore[no-untyped-call]

    def call(self, name: str, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {self.token}"),)
        return getattr(self.stub, name)(request, metadata=metadata, timeout=60)

    def check_in(self, **changes: Any) -> pb.CheckInResponse:
        values: dict[str, Any] = {
            "protocol": 1,
            "device": self.device,
            "capabilities": ABLE,
            "num_examples": 5,
        }
        request = pb.CheckInRequest(**{**values, "own_model": True, **changes})
        return cast(pb.CheckInResponse, self.call("CheckIn", request))

    def lease(self, **changes: Any) -> pb.Lease:
        found = self.check_in(**changes)
        assert found.WhichOneof("answer") == "lease", found.refusal.text
        return found.lease

    def upload(self, lease: pb.Lease, payload: bytes, offset: int = 0) -> pb.UploadStatus:
        content = payload[offset : offset + protocol.CHUNK]
        chunk = protocol.chunk(content, offset, len(payload), lease.id)
        return cast(pb.UploadStatus, self.call("Upload", chunk))

    def report(self, lease: pb.Lease, packet: Packet) -> pb.Acknowledgement:
        if packet.payload:
            assert self.upload(lease, packet.payload).problem == ""
        request = pb.ReportRequest(lease=lease.id, reply=packet.header)
        return cast(pb.Acknowledgement, self.call("Report", request))

    def refused(self, name: str, request: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(name, request)
        return caught.value.code()


@contextmanager
def asked(world: World, task: Task, waits: Waits = FOREVER) -> Iterator["Future[Reply]"]:
    """A task that is in progress; its reply. In the end its round is over, in no time."""
    packet, rounds = messages.pack_task(task), world.gateway.rounds
    digest = hashlib.sha256(packet.header).hexdigest()

    def answer() -> Reply:
        found = world.gateway.answer(packet, waits)
        return messages.unpack_reply(found, len(found.payload))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(answer)
        future.add_done_callback(lambda _: world.look())
        with rounds.changed:
            assert rounds.changed.wait_for(
                lambda: (rounds.job and rounds.job.digest == digest) or future.done(), 20
            )
        try:
            yield future
        finally:
            while not future.done():
                world.end_round()
                wait([future], 0.1)


def sums(reply: Reply) -> float:
    """The one value that all tensors of a partial aggregate hold."""
    found = messages.content(reply)["adapter"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    values = torch.cat([tensor.flatten() for tensor in found.values()])
    assert bool((values == values[0]).all())
    return float(values[0])
