"""Requests of nodes as bytes, through the HTTP protocol of the server's front and its application.

No socket is opened for them: the protocol object of uvicorn reads from memory. Behind the front is
nobody, so that a request which is let through is answered with 502.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import certifi
import httpx
import uvicorn
from uvicorn.server import ServerState

from corolla.host.occupancy import Occupancy, Occupant
from corolla.server.deployment import front
from corolla.server.deployment.connections import Hurried
from experiments.bench import mutations

_TURNS = 40
_BODY = b"x" * 40
_HEAD = (
    b"POST /v1/fleet/pull-messages HTTP/1.1",
    b"Host: localhost",
    b"Content-Type: application/protobuf",
    b"flwr-timestamp: 2026-01-01T00:00:00",
    b"flwr-signature: c2lnbmF0dXJl",
    b"Accept: */*",
)
_LINES = (
    b"Content-Length: 40",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 1e3",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Expect: 100-continue",
    b"Connection: upgrade",
    b"Upgrade: h2c",
    b"Upgrade: websocket",
    b"Host:",
    b" folded",
    b"flwr-key: \xff\xfe",
    b"flwr-" + b"x" * 5000 + b": 1",
    b"x: " + b"y" * 70_000,
    b": nothing",
    b"\x00: 1",
)
_FIRST = (
    b"GET / HTTP/1.1",
    b"CONNECT localhost:1 HTTP/1.1",
    b"TRACE /v1/fleet/pull-messages HTTP/1.1",
    b"POST http://other/v1/fleet/pull-messages HTTP/1.1",
    b"POST /v1/fleet/../control HTTP/1.1",
    b"POST /v1/fleet/%2e%2e/x HTTP/1.1",
    b"POST /v1/fleet/pull-messages HTTP/9.9",
    b"PRI * HTTP/2.0",
    b"POST",
    b"",
)


def request(rng: random.Random) -> bytes:
    """One request, or more behind each other, of which something is wrong."""
    lines = list(_HEAD)
    if rng.random() < 0.3:
        lines[0] = rng.choice(_FIRST)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(_LINES))
    body = rng.choice((_BODY, b"28\r\n" + _BODY + b"\r\n0\r\n\r\n", b"", b"zz\r\n", _BODY * 9))
    data = rng.choice((b"\r\n", b"\r\n", b"\n")).join([*lines, b"", b""]) + body
    if rng.random() < 0.5:
        data = mutations.raw(rng, data)
    return data * rng.choice((1, 1, 1, 3)) or b"\r\n"  # no bytes are none that arrive


class _Pipe(asyncio.Transport):
    """What a connection is to the protocol: it keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 9), "sockname": ("127.0.0.1", 8)})
        self.written, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """Nothing more comes."""

    resume_reading = pause_reading


class _Nobody(httpx.AsyncBaseTransport):
    """Takes a request in, as a SuperLink does that then goes away."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        raise httpx.ConnectError("nobody is there")


class Front:
    """The front's protocol and application, in an event loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._failed = loop, list[str]()
        with patch.object(httpx, "AsyncHTTPTransport", lambda **_: _Nobody()):
            application = front._application("https://127.0.0.1:1", Path(certifi.where()), 100)
        self._config = uvicorn.Config(
            application, http=Hurried, ws="none", log_config=None, access_log=False
        )
        self._config.load()
        loop.set_exception_handler(lambda _, context: self._failed.append(str(context)))

    def statuses(self, data: bytes) -> list[int]:
        """The codes of all answers. Raises AssertionError where the application failed."""
        return self._loop.run_until_complete(self._statuses(data))

    async def _statuses(self, data: bytes) -> list[int]:
        pipe, state = _Pipe(), ServerState()
        protocol = Hurried(config=self._config, server_state=state, app_state={})
        protocol.occupancy = Occupancy()
        protocol.occupant = Occupant({"": 1}, lambda: None)
        protocol.occupancy.enter(protocol.occupant)
        protocol.connection_made(pipe)
        protocol.data_received(data)
        await _turns()
        protocol.connection_lost(None)
        await _turns()
        assert not state.tasks, "the application goes on without a connection"
        answers = bytes(pipe.written).split(b"HTTP/1.1 ")[1:]
        found = [int(answer[:3]) for answer in answers]
        assert 500 not in found, f"the application failed: {bytes(pipe.written)[:200]!r}"
        assert not self._failed, self._failed[:1]
        return found


async def _turns() -> None:
    """Nothing here waits for a network: after so many turns of the loop all is done."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


@contextmanager
def served() -> Iterator[Front]:
    """A front behind which nobody is."""
    loop = asyncio.new_event_loop()
    try:
        yield Front(loop)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
