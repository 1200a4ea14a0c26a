"""Requests that never become whole: do they leave anything behind, do they keep others out?"""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from corolla.server.deployment import front as front_module
from tests.attacks.test_outsider import HIDDEN, served
from tests.server.deployment.test_front import Door, open_tls
from tests.server.gateway.gateways import until

START = b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\n"
WHOLE = START + b"content-length: 0\r\n\r\n"
POISON = {
    "two lengths": START
    + b"content-length: 80\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    + HIDDEN,
    "beyond ASCII": START + b"flwr-public-key: \xff\xfe\r\ncontent-length: 0\r\n\r\n",
    "short": START + b"content-length: 100\r\n\r\nabc",
    "aborted": START + b"content-type: application/protobuf\r\ncontent-length: 100\r\n\r\nabc",
    "not read": WHOLE,
    "no TLS": b"",
}


def status(door: Door) -> int | None:
    """The status of a whole call; None where there is no answer."""
    with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError), open_tls(door) as own:
        own.sendall(WHOLE)
        answer = own.recv(65536)
        return int(answer.split(b" ", 2)[1]) if answer else None
    return None


@pytest.mark.parametrize("name", POISON)
def test_nothing_is_left_of_requests_that_are_cut_off(tmp_path: Path, name: str) -> None:
    with served(tmp_path) as (door, _, front):
        host, port = door.address.split(":")
        for _ in range(40):
            if name == "no TLS":
                socket.create_connection((host, int(port)), timeout=60).close()
                continue
            with contextlib.suppress(ConnectionError, ssl.SSLError), open_tls(door) as own:
                own.sendall(POISON[name])
        until(lambda: not front.server.occupancy._open, 60)
        assert status(door) == 200


@contextmanager
def halves(door: Door, number: int) -> Iterator[None]:
    """Connections that stay open, each with a request whose body does not come."""
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(open_tls(door)).sendall(POISON["short"])
        yield


@pytest.mark.parametrize("seconds", [0.5, 1000.0])
def test_bodies_that_do_not_come_keep_nobody_out(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever time they may take: one ends for a connection that comes (test_held_places.py)."""
    monkeypatch.setattr(front_module, "_CONNECTIONS", 20)  # five of an address
    monkeypatch.setattr(front_module, "_WHOLE", seconds)
    with served(tmp_path) as (door, _, _), halves(door, 5):
        until(lambda: status(door) == 200, 60)
