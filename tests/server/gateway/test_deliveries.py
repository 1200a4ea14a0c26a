"""What phones send under a lease: pieces of replies, reports, and what is hostile in them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.wire import messages
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet
from tests.server.gateway import gateways
from tests.server.gateway.callers import CONFIG, Caller, asked, sums
from tests.server.gateway.gateways import Clock, World


def test_a_report_is_answered_alike_and_counted_once(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=2)
    own, other = caller("p1"), caller("p2")
    with asked(world, task) as reply:
        lease = own.lease()
        packet = gateways.update_of(task, "gate/p1", 1.0, 2)
        request = pb.ReportRequest(lease=lease.id, reply=packet.header)
        own.report(lease, packet)
        assert [own.call("Report", request).accepted for _ in range(3)] == [True] * 3
        assert own.check_in().refusal.text == "asked already in this round"
        bad = gateways.update_of(task, "gate/p2", math.inf)
        theirs = other.lease()
        first = other.report(theirs, bad)
        again = other.call("Report", pb.ReportRequest(lease=theirs.id, reply=bad.header))
        assert (first.accepted, first.why) == (again.accepted, again.why)
        third = caller("p3")
        assert third.report(third.lease(), gateways.update_of(task, "gate/p3", 3.0, 1)).accepted
        found = reply.result(10)
    assert (found.clients, found.num_examples, sums(found)) == (2, 3, 5.0)
    assert own.call("Report", request).accepted  # also when the round is over
    assert not other.call("Report", pb.ReportRequest(lease=theirs.id, reply=bad.header)).accepted


HOSTILE: dict[str, tuple[Callable[[Task], Packet], str]] = {
    "garbage": (lambda task: Packet(b"\xff" * 50, b""), "parsed"),
    "nothing": (lambda task: Packet(b"", b""), "schema"),
    "not finite": (lambda task: gateways.update_of(task, "gate/p1", math.nan), "finite"),
    "huge": (lambda task: gateways.update_of(task, "gate/p1", 1e30), "beyond"),
    "too heavy": (lambda task: gateways.update_of(task, "gate/p1", examples=6), "examples"),
    "weightless": (lambda task: gateways.update_of(task, "gate/p1", examples=0), "examples"),
    "another phone's": (lambda task: gateways.update_of(task, "gate/p2"), "client"),
    "of another round": (
        lambda task: gateways.update_of(replace(task, round=7), "gate/p1"),
        "stale",
    ),
    "cut short": (
        lambda task: Packet(gateways.update_of(task, "gate/p1").header, b"12345678"),
        "bytes",
    ),
    "a gateway's own": (
        lambda task: messages.pack_reply(
            Reply(
                *(task.run_id, task.round, task.base_version, task.kind, "gate/p1"),
                num_examples=3,
                clients=3,
                payload=gateways.update_of(task, "gate/p1").payload,
            )
        ),
        "gateway",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_refused_and_does_not_touch_the_sum(
    name: str, world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    bad, good = caller("p1"), caller("p2")
    with asked(world, task) as reply:
        told = bad.report(bad.lease(), HOSTILE[name][0](task))
        assert not told.accepted
        assert HOSTILE[name][1] in told.why
        assert told.retry.min_seconds > 0
        assert good.report(good.lease(), gateways.update_of(task, "gate/p2", 0.5, 4)).accepted
        found = reply.result(10)
    assert (found.clients, sums(found)) == (1, 2.0)


def test_an_upload_goes_on_where_it_was_and_takes_no_chunk_twice_or_damaged(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    own, payload = caller(), gateways.update_of(task, "gate/p1").payload
    with asked(world, task) as reply:
        lease = own.lease()

        def piece(start: int, end: int, **changes: Any) -> int:
            chunk = protocol.chunk(payload[start:end], start, len(payload), lease.id)
            for key, value in changes.items():
                setattr(chunk, key, value)
            return int(own.call("Upload", chunk).received)

        assert piece(0, 50) == 50
        assert piece(0, 50) == 50  # its answer was lost
        assert piece(60, 90) == 50  # a gap
        assert piece(50, 90, crc32=1) == 50  # damaged
        assert piece(50, 90) == 90
        assert piece(90, len(payload)) == len(payload)
        header = gateways.update_of(task, "gate/p1").header
        assert own.call("Report", pb.ReportRequest(lease=lease.id, reply=header)).accepted
        assert reply.result(10).clients == 1


def test_an_upload_is_bounded_by_what_an_honest_one_needs(
    world: World, caller: Callable[..., Caller]
) -> None:
    own = caller()
    with asked(world, gateways.a_task(CONFIG)):
        lease = own.lease()
        assert lease.max_upload_bytes < 1 << 20
        large = b"x" * (lease.max_upload_bytes + 1)
        assert "at most" in own.upload(lease, large).problem
        assert own.upload(lease, b"y" * 200).received == 200
        chunk = protocol.chunk(b"z" * 10, 200, 300, lease.id)
        assert "before" in own.call("Upload", chunk).problem


def test_nobody_speaks_for_another_device(world: World, caller: Callable[..., Caller]) -> None:
    own, thief = caller("p1"), caller("p9", gateways.OTHER)
    with asked(world, gateways.a_task(CONFIG)):
        lease = own.lease()
        chunk = protocol.chunk(b"abc", 0, 3, lease.id)
        denied = grpc.StatusCode.UNAUTHENTICATED
        assert thief.refused("Upload", chunk) == denied
        assert thief.refused("Report", pb.ReportRequest(lease=lease.id)) == denied
        assert thief.refused("Heartbeat", pb.HeartbeatRequest(lease=lease.id)) == denied
        assert own.upload(lease, b"abc").received == 3
        assert thief.check_in(device="p1").refusal.reason == pb.Refusal.REASON_NAME
        assert thief.check_in().WhichOneof("answer") == "lease"
        namesake = own.check_in(device="p9")
        assert namesake.refusal.text == "another device is called 'p9'"


def test_the_upload_of_a_phone_that_vanished_is_dropped(tmp_path: Path) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    with gateways.serving(tmp_path, Clock(), seats=1) as world:
        first, second = Caller(world, "p1"), Caller(world, "p2")
        with first.channel, second.channel, asked(world, task):
            assert first.upload(first.lease(), b"abc").received == 3
            job = world.gateway.rounds.job
            assert job
            (upload,) = job.uploads.values()
            world.later(world.gateway.settings.lease)
            second.lease()
            assert not job.uploads
            assert upload._file.closed
