"""The only door to the outside: TLS, and nothing but what a SuperNode asks of the Fleet API.

Flower serves Fleet, Control and Runtime on one port, Control without any authentication: whoever
reaches it can register a key and run code on every client. So the SuperLink is bound to loopback
and this reverse proxy passes the calls in FLEET alone; all others are 404 and never travel on.
deploy/nginx.conf is the same door for many nodes: it limits connections by address as well.
"""

import asyncio
import base64
import hashlib
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from corolla.errors import ConfigError
from corolla.host import logs
from corolla.host.processes import when_orphaned
from corolla.host.supervised import Child, open_files
from corolla.server.deployment.connections import CountingServer, Hurried

FLEET = frozenset(
    "register-node activate-node deactivate-node unregister-node send-node-heartbeat pull-messages "
    "push-messages get-run get-fab push-object pull-object confirm-message-received".split()
)
MAX_BODY = 16 << 20
"""Bytes of one call: Flower cuts arrays into 5 MiB; a header of ours has 8 MiB at most."""
_CONNECTIONS = 1024
"""Connections at most, and a third of the open-file limit: a call has two, the rest is ours."""
_WHOLE = 60.0
"""Seconds in which its body must be there."""
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_SKEW = 300.0
"""Seconds that Flower lets a node's clock be behind; 5 ahead."""
_REQUEST = ("content-type", "content-length", "accept", "traceparent")
_WINDOW, _LINES = 60.0, 60
"""Seconds, and refusals that are logged in them: headers are the caller's choice."""

_log = logs.logger("front")
_uvicorn = logging.getLogger("uvicorn")  # its words would go to the terminal
_uvicorn.addHandler(logging.NullHandler())
_uvicorn.propagate = False


class _TooLargeError(Exception):
    """A body that was not declared and is larger than MAX_BODY."""


class Front:
    """Serves in the thread that calls `run`, until another one calls `stop`."""

    def __init__(self, door: socket.socket, certs: Path, port: int, ca: Path) -> None:
        """TLS at `door` with server.pem of `certs`; calls go on to loopback `port`, whose
        certificate `ca` must have signed. Raises ConfigError for files that cannot be used.
        """
        connections = min(_CONNECTIONS, open_files() // 3)
        config = uvicorn.Config(
            _application(f"https://127.0.0.1:{port}", ca, connections),
            http=Hurried,
            ws="none",
            ssl_certfile=str(certs / "server.pem"),
            ssl_keyfile=str(certs / "server.key"),
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
            log_config=None,
            access_log=False,
            server_header=False,
        )
        self.server = CountingServer(config, door, connections)
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot serve with {certs / 'server.pem'}: {error}") from error

    def run(self) -> None:
        self.server.run()

    def stop(self) -> None:
        self.server.should_exit = True


def process(
    door: socket.socket, certs: Path, port: int, ca: Path, logs: Path, run_id: str
) -> Child:
    """A front in a process of its own, not yet started; it ends with this one.

    So that whoever opens connections uses up its files, and not those of this process. What it
    refuses stands in the supervisor's log of the run, in the folder `logs`.
    """
    words = [str(own) for own in (door.fileno(), certs.resolve(), port, ca, logs, run_id)]
    log = logs / "front.log"
    child = Child([sys.executable, "-m", __name__, *words], log, listener=lambda _: None)
    child.files = (door.fileno(),)
    return child


def bound(door: socket.socket) -> str:
    """HOST:PORT of a socket that `listen` has made."""
    host, port = door.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: str) -> socket.socket:
    """HOST:PORT, held from now on. Raises ConfigError when it cannot be had."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--address {address!r}: expected HOST:PORT")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--address {address} cannot be had: {reason}; name another") from error


def _application(upstream: str, ca: Path, connections: int) -> Starlette:
    context = ssl.create_default_context(cafile=str(ca))
    limits = httpx.Limits(max_connections=connections)
    # Not a client: that would follow redirects, and keep cookies of one node for the next.
    transport = httpx.AsyncHTTPTransport(verify=context, limits=limits, trust_env=False)
    refused = _Refused()

    async def fleet(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in FLEET:
            return PlainTextResponse("not found", 404)
        if _malformed(request):
            return PlainTextResponse("malformed", 400)
        if int(request.headers.get("content-length") or 0) > MAX_BODY:
            return PlainTextResponse("too large", 413)
        passed = {
            name: value
            for name, value in request.headers.items()
            if name.startswith("flwr-") or name in _REQUEST
        }
        passed["host"] = upstream.removeprefix("https://")
        onward = httpx.Request(
            "POST",
            f"{upstream}/v1/fleet/{call}",
            headers=passed,
            content=_limited(request),
            extensions={"timeout": _TIMEOUT.as_dict()},
        )
        try:
            answer = await transport.handle_async_request(onward)
        except _TooLargeError:
            return PlainTextResponse("too large", 413)
        except TimeoutError:
            return PlainTextResponse("too slow", 408, {"connection": "close"})
        except ClientDisconnect:
            return PlainTextResponse("", 400)
        except httpx.TransportError:  # the SuperLink is away: SuperNodes try again after a 502
            return PlainTextResponse("the SuperLink is away", 502)
        if answer.status_code >= 400:
            refused.note(request, call, answer.status_code)
        kept = {k: v for k, v in answer.headers.items() if k in ("content-type", "content-length")}
        return StreamingResponse(_body(answer), answer.status_code, kept)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with transport:
            yield

    return Starlette(routes=[Route("/v1/fleet/{call}", fleet, methods=["POST"])], lifespan=lifespan)


def _malformed(request: Request) -> bool:
    """Returns whether a request has two lengths, or headers beyond ASCII, which cannot go on."""
    headers = request.headers
    two = "content-length" in headers and "transfer-encoding" in headers
    return two or not all(value.isascii() for value in headers.values())


async def _limited(request: Request) -> AsyncIterator[bytes]:
    size, stream = 0, request.stream()
    deadline = asyncio.get_running_loop().time() + _WHOLE
    while True:
        async with asyncio.timeout_at(deadline):  # around what is awaited here, and not the `yield`
            chunk = await anext(stream, None)
        if chunk is None:
            return
        size += len(chunk)
        if size > MAX_BODY:
            raise _TooLargeError
        yield chunk


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


class _Refused:
    """Says why the SuperLink refuses a node: once a minute for each, in _LINES lines at most."""

    def __init__(self) -> None:
        self._began, self._more = time.monotonic(), 0
        self._told: set[tuple[str, int]] = set()

    def note(self, request: Request, call: str, status: int) -> None:
        key = fingerprint(_shown_key(request))
        now = time.monotonic()
        if now - self._began >= _WINDOW:
            if self._more:
                _log.warning("refused", why=f"and {self._more} more")
            self._told.clear()
            self._began, self._more = now, 0
        if (key, status) in self._told:
            return
        if len(self._told) >= _LINES:
            self._more += 1
            return
        self._told.add((key, status))
        _log.warning("refused", key=key, call=call, status=status, why=_why(request, status))


def fingerprint(public_key: bytes) -> str:
    """A short name for a node's key, given in PEM."""
    return hashlib.sha256(public_key.strip()).hexdigest()[:16]


def _shown_key(request: Request) -> bytes:
    """The key in a call's header, or the header where that holds none."""
    text = request.headers.get("flwr-public-key", "")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return text.encode()


def _why(request: Request, status: int) -> str:
    if status == 412:
        return "its key is not registered, or its last connection still counts as online"
    if status != 401:
        return f"Flower answered {status}"
    try:
        signed = datetime.fromisoformat(request.headers["flwr-timestamp"])
        age = (datetime.now(UTC) - signed).total_seconds()
    except (KeyError, ValueError, TypeError):
        return "the call is not signed as a SuperNode signs it"
    if not -5 < age < _SKEW + 5:
        behind = "behind" if age > 0 else "ahead"
        return f"the node's clock is {abs(age):.0f} s {behind} of this one: set it"
    return "its key is not registered, or the signature is not of that key"


def main(words: Sequence[str]) -> int:
    """Serve until the parent ends; the exit code says why not."""
    number, certs, port, ca, folder, run_id = words
    when_orphaned(lambda: os._exit(0))
    logs.configure(Path(folder, "supervisor.jsonl"), run_id)
    try:
        Front(socket.socket(fileno=int(number)), Path(certs), int(port), Path(ca)).run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
