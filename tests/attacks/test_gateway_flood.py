"""Outsiders that open connections to a gateway and make no call, or calls without a token.

gRPC takes all that come and keeps them: each has a file and some memory of the gateway, for a
stranger's answers to pings.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from corolla.host import door
from corolla.host.door import SHARE, Door
from corolla.host.occupancy import Occupancy
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import service
from tests.server.gateway import gateways
from tests.server.gateway.callers import Caller
from tests.server.gateway.gateways import Clock, World, until

PLACES, FLOOD = 4 * SHARE, 40


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[Door]:
    """The doors of the gateways that are made in a test."""
    found, make = list[Door](), Door.__init__

    def noted(own: Door, address: str, most: int) -> None:
        make(own, address, most)
        found.append(own)

    monkeypatch.setattr(Door, "__init__", noted)
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doors: list[Door]) -> Iterator[World]:
    monkeypatch.setattr(service, "CONNECTIONS", PLACES)
    with gateways.serving(tmp_path, Clock(), seats=4) as found:
        yield found


@contextmanager
def flood(world: World, sources: int) -> Iterator[list[socket.socket]]:
    """Silent connections from so many addresses of this machine."""
    with ExitStack() as stack:
        port = int(world.address.split(":")[1])
        yield [
            stack.enter_context(
                socket.create_connection(
                    ("127.0.0.1", port), 60, source_address=(f"127.0.0.{2 + n % sources}", 0)
                )
            )
            for n in range(FLOOD)
        ]


def ended(own: socket.socket, seconds: float) -> bool:
    own.settimeout(seconds)
    try:
        return own.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(("sources", "kept"), [(1, PLACES // SHARE), (2 * SHARE, PLACES)])
def test_silent_connections_are_counted_and_keep_no_phone_out(
    world: World, doors: list[Door], sources: int, kept: int
) -> None:
    with flood(world, sources) as held:
        until(lambda: len(doors[0]._visitors) == kept)
        assert all(ended(own, 60) for own in held[: FLOOD - kept])
        phone = Caller(world, "honest")
        with phone.channel:
            assert phone.check_in().refusal.text == "no round"
        assert len(doors[0]._visitors) <= PLACES


def test_where_nobody_counts_all_of_them_stay(
    world: World, doors: list[Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Occupancy, "enter", lambda *_: True)
    with flood(world, 1):
        until(lambda: len(doors[0]._visitors) == FLOOD)


def test_a_connection_without_a_token_ends_and_one_with_it_stays(
    world: World, monkeypatch: pytest.MonkeyPatch, doors: list[Door]
) -> None:
    monkeypatch.setattr(door, "SILENCE", 0.5)
    phone = Caller(world, "honest")
    with phone.channel, flood(world, 1) as held:
        assert phone.check_in().refusal.text == "no round"
        assert all(ended(own, 60) for own in held)
        until(lambda: len(doors[0]._visitors) == 1)
        assert phone.check_in().refusal.text == "no round"


def test_a_stranger_that_calls_too_often_loses_its_connection(world: World) -> None:
    stranger = Caller(world, "x", token="nobody's")
    with stranger.channel:
        codes = {stranger.refused("CheckIn", pb.CheckInRequest()) for _ in range(250)}
    assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE}
