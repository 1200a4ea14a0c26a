"""Who may call a gateway, and how often."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from corolla.proto import device_pb2 as pb
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


def test_strangers_whose_calls_never_end_do_not_hold_up_the_phones(
    world: World, caller: Callable[..., Caller]
) -> None:
    over = threading.Event()

    def silent() -> Iterator[bytes]:
        over.wait(20)
        yield from ()

    with world.channel() as channel:
        call: Any = channel.stream_unary("/corolla.v1.Phones/Upload")
        held = [call.future(silent(), timeout=20) for _ in range(64)]
        try:
            codes = {future.code() for future in held}  # each has been turned away
            assert caller().check_in().refusal.text == "no round"
        finally:
            over.set()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}
