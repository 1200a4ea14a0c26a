"""Uploads that are slow, or that a gateway does not take; and a reply that waits on the disk."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from corolla.client.phone.delivery import deliver
from corolla.client.phone.kept import Kept
from corolla.client.phone.meter import SessionOverError
from corolla.client.phone.policies import NO_LIMITS
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.storage.disk import DiskLimits
from corolla.wire.packet import Packet
from tests.client.phone.standing import method
from tests.client.phone.test_session import CONFIG, Scripted, a_phone
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World

MIB = protocol.CHUNK
LEASE = "0" * 32


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, seats=1) as found:
        yield found


class TooSlow(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return ""


class Wordy(TooSlow):
    def details(self) -> str:
        return "é" * 3000


def test_the_words_of_an_error_count_against_the_limits_of_a_day(world: World) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))

    def refused(request: pb.CheckInRequest) -> pb.CheckInResponse:
        raise Wordy

    with phone.channel:
        before = phone.caller.meter.spent().bytes
        answer = method(refused, pb.CheckInResponse)
        assert phone.caller.once(answer, pb.CheckInRequest(), seconds=30) is None
    assert phone.caller.meter.spent().bytes - before >= 6000


def test_on_a_slow_line_an_update_goes_up_in_smaller_chunks_and_the_lease_is_kept(
    world: World,
) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    payload, taken, sizes = os.urandom(MIB + 1000), bytearray(), list[int]()

    def upload(chunk: pb.Chunk) -> pb.UploadStatus:
        sizes.append(len(chunk.content))
        if sizes[-1] > 1 << 18:
            raise TooSlow
        taken.extend(chunk.content)
        return pb.UploadStatus(received=len(taken))

    class Stub:
        Upload = method(upload, pb.UploadStatus)
        Report = method(lambda _: pb.Acknowledgement(accepted=True), pb.Acknowledgement)

    phone.caller.stub = Stub()
    with phone.channel:
        found = deliver(phone.caller, LEASE, Packet(b"", payload), time.monotonic() + 60)
    assert found.accepted
    assert taken == payload
    assert sizes[:3] == [MIB, MIB >> 1, MIB >> 2]


@pytest.mark.parametrize(
    ("steps", "most"),
    [([1, 0], 25), ([1], 30)],
    ids=["back and forth", "byte by byte"],
)
def test_an_upload_ends_whatever_the_gateway_says_it_received(
    world: World, steps: list[int], most: int
) -> None:
    phone, calls_made = a_phone(world, Scripted(gateways.a_task(CONFIG))), 0

    def upload(chunk: pb.Chunk) -> pb.UploadStatus:
        nonlocal calls_made
        received = calls_made + 1 if steps == [1] else steps[calls_made % 2]
        calls_made += 1
        return pb.UploadStatus(received=received)

    class Stub:
        Upload = method(upload, pb.UploadStatus)

    phone.caller.stub = Stub()
    packet = Packet(b"", bytes(2 * MIB))
    with phone.channel, pytest.raises(SessionOverError, match="does not take the update in"):
        deliver(phone.caller, LEASE, packet, time.monotonic() + 60)
    assert calls_made <= most


def test_an_upload_ends_with_its_round(world: World) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    with phone.channel, pytest.raises(SessionOverError, match="the round is over"):
        deliver(phone.caller, LEASE, Packet(b"", b"x"), time.monotonic() - 1)


def test_a_reply_on_the_disk_is_its_owners_alone(tmp_path: Path) -> None:
    kept = Kept(tmp_path, NO_LIMITS, DiskLimits())
    kept.keep_reply(LEASE, Packet(b"a", b"b"))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept.reply(LEASE) == Packet(b"a", b"b")
    assert kept.reply("1" * 32) is None
