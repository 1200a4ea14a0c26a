"""Who gets a lease, and who is told why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.server.gateway import outbound
from corolla.server.gateway.access import Token
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.settings import GatewaySettings
from corolla.wire.packet import Packet
from tests.server.gateway import gateways
from tests.server.gateway.callers import ABLE, CONFIG, Caller, asked
from tests.server.gateway.gateways import Clock, World


def test_the_seat_of_a_phone_that_vanished_goes_to_another(
    tmp_path: Path,
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    with gateways.serving(tmp_path, Clock(), seats=1, over_select=1.0) as world:
        first, second = Caller(world, "p1"), Caller(world, "p2")
        with first.channel, second.channel, asked(world, task) as reply:
            gone = first.lease()
            world.later(world.gateway.settings.lease - 0.1)
            assert second.check_in().refusal.text == "enough devices have been chosen"
            world.later(0.1)
            packet = gateways.update_of(task, "gate/p2")
            assert second.report(second.lease(), packet).accepted
            assert reply.result(10).clients == 1
            told = first.report(gone, Packet(packet.header, b""))
            assert not told.accepted


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"protocol": 2}, pb.Refusal.REASON_PROTOCOL, "speaks version 1, not 2"),
        ({"device": "../p"}, pb.Refusal.REASON_NAME, "A-Z"),
        ({"device": "x" * 65}, pb.Refusal.REASON_NAME, "1 to 64"),
        ({"num_examples": 0}, pb.Refusal.REASON_NOT_ELIGIBLE, "no examples"),
        (
            {"capabilities": update_pb2.Capabilities(charging=True)},
            pb.Refusal.REASON_NOT_ELIGIBLE,
            "it is not idle",
        ),
        (
            {"capabilities": update_pb2.Capabilities(idle=True, charging=True, metered=True)},
            pb.Refusal.REASON_NOT_ELIGIBLE,
            "unmetered",
        ),
        ({"own_model": False}, pb.Refusal.REASON_MODEL, "offers no base model"),
        ({}, pb.Refusal.REASON_NO_TASK, "no round"),
    ],
)
def test_who_gets_no_task_is_told_why_and_when_to_come_back(
    changes: dict[str, Any],
    reason: "pb.Refusal.Reason",
    text: str,
    caller: Callable[..., Caller],
) -> None:
    found = caller().check_in(**changes)
    assert found.refusal.reason == reason
    assert text in found.refusal.text
    assert 0 < found.retry.min_seconds < found.retry.max_seconds


def test_a_name_goes_to_the_token_that_is_of_it_and_is_free_when_its_token_is_gone(
    tmp_path: Path,
) -> None:
    known = {"a", "b", "c"}
    gateway = Gateway(GatewaySettings("gate", tmp_path), known=known.__contains__)

    def text(owner: str, device: str = "", name: str = "p9") -> str:
        values: dict[str, Any] = {
            "protocol": 1,
            "capabilities": ABLE,
            "num_examples": 5,
            "own_model": True,
        }
        request = pb.CheckInRequest(device=name, **values)
        return gateway.check_ins.answer(request, Token(owner, device, "")).refusal.text

    taken = "another device is called 'p9'"
    assert [text("a"), text("b"), text("c", "p9"), text("a")] == ["no round", taken] * 2
    known.remove("c")
    assert text("b") == "no round"


def test_a_task_that_cannot_be_told_to_a_phone_takes_no_seat(
    world: World, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(*_: Any) -> Any:
        raise ValueError("header has 9 MiB")

    with asked(world, gateways.a_task(CONFIG)):
        monkeypatch.setattr(outbound.Parcel, "header", too_long)
        refusal = caller().check_in().refusal
        job = world.gateway.rounds.job
        assert job
        assert not job.round.leases
    assert refusal.reason == pb.Refusal.REASON_NO_TASK
    assert refusal.text == "the task cannot be told: header has 9 MiB"
