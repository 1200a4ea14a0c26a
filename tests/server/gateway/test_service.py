"""Who may call a gateway, and how often."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from corolla.host.occupancy import Occupancy, Occupant
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import service
from corolla.server.gateway.service import BURST, RATE
from tests.server.gateway import gateways
from tests.server.gateway.callers import Caller
from tests.server.gateway.gateways import World


@pytest.mark.parametrize("token", ["", "wrong", gateways.TOKEN[:-1], gateways.TOKEN + "x"])
def test_a_wrong_token_gets_one_line_and_nothing_else(
    token: str, world: World, caller: Callable[..., Caller]
) -> None:
    stranger = caller(token=token)
    for name, request in (
        ("CheckIn", pb.CheckInRequest()),
        ("Download", pb.DownloadRequest()),
        ("Upload", pb.Chunk()),
        ("Report", pb.ReportRequest()),
        ("Heartbeat", pb.HeartbeatRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stranger.call(name, request)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.details() == "this gateway does not know the token"


def test_too_many_calls_of_one_phone_are_put_off(
    world: World, caller: Callable[..., Caller]
) -> None:
    own, other = caller("p1"), caller("p2")
    request = pb.HeartbeatRequest(lease="0" * 32)
    for _ in range(int(BURST)):
        own.call("Heartbeat", request)
    assert own.refused("Heartbeat", request) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not other.call("Heartbeat", request).wanted
    world.later(1.0)
    for _ in range(int(RATE)):
        own.call("Heartbeat", request)
    assert own.refused("Heartbeat", request) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_all_phones_of_a_token_together_call_no_more_often_than_some(
    world: World, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections they have."""
    monkeypatch.setattr(service, "BURST", 20.0)
    monkeypatch.setattr(service, "OF_TOKEN", 2)
    request = pb.HeartbeatRequest(lease="0" * 32)
    for device in ("p1", "p2"):
        own = caller(device)
        for _ in range(20):
            own.call("Heartbeat", request)
    assert caller("p3").refused("Heartbeat", request) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not caller("p9", gateways.OTHER).call("Heartbeat", request).wanted


@contextmanager
def silent(world: World, number: int, token: str = gateways.TOKEN) -> Iterator[list[Any]]:
    """Calls of one connection whose request never comes."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    with world.channel() as channel:
        call: Any = channel.stream_unary("/corolla.v1.Phones/Heartbeat")
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            yield [call.future(nothing(), metadata=metadata, timeout=60) for _ in range(number)]
        finally:
            over.set()


def test_strangers_whose_calls_never_end_do_not_hold_up_the_phones(
    world: World, caller: Callable[..., Caller]
) -> None:
    with silent(world, 64, token="nobody's") as held:
        codes = {future.code() for future in held}  # each has been turned away
        assert caller().check_in().refusal.text == "no round"
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


def test_a_call_whose_request_does_not_come_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.SECONDS, "Heartbeat", 0.1)
    with silent(world, 1) as held:
        assert held[0].code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert held[0].details() == "the call's request did not come in time"


def test_of_too_many_calls_of_a_connection_as_many_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.SECONDS, "Heartbeat", 1000.0)
    with silent(world, service.MOST["connection"] + 3) as held:
        gateways.until(lambda: sum(future.done() for future in held) == 3, 60)
        assert {future.code() for future in held if future.done()} == {
            grpc.StatusCode.DEADLINE_EXCEEDED
        }


def test_while_all_calls_of_a_connection_are_at_work_one_more_is_refused(
    world: World, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.MOST, "connection", 1)
    at_work, heard = threading.Event(), Occupancy.settle

    def noted(calls: Occupancy, call: Occupant) -> None:
        heard(calls, call)
        at_work.set()

    monkeypatch.setattr(Occupancy, "settle", noted)
    own, metadata = caller(), (("authorization", f"Bearer {gateways.TOKEN}"),)
    with world.gateway.rounds.changed:  # answers wait for it
        first = own.stub.Heartbeat.future(pb.HeartbeatRequest(), metadata=metadata, timeout=60)
        assert at_work.wait(60)
        found = own.refused("Heartbeat", pb.HeartbeatRequest())
    assert found == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not first.result().wanted


@pytest.mark.parametrize(
    ("sent", "details"), [([], "a call has a request"), ([b"\xff"], "message cannot be parsed")]
)
def test_a_call_without_a_request_or_with_bytes_that_are_none_is_refused(
    world: World, sent: list[bytes], details: str
) -> None:
    with world.channel() as channel:
        call: Any = channel.stream_unary("/corolla.v1.Phones/CheckIn")
        metadata = (("authorization", f"Bearer {gateways.TOKEN}"),)
        found = call.future(iter(sent), metadata=metadata, timeout=60)
        assert found.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert found.details() == details
