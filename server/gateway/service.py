"""The service that phones call: TLS, a token on every call, limits; then the gateway.

An event loop waits for requests, and until answers are taken, so that callers who do neither hold
no thread; what is heard is answered by a few threads, reports by some of their own.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc

from corolla.errors import WireError
from corolla.host import logs
from corolla.host.door import Door
from corolla.host.occupancy import Occupancy, Occupant
from corolla.host.supervised import open_files
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.access import Token, who
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.leases import Bucket
from corolla.wire import rpc
from corolla.wire.parsing import parse

RATE, BURST = 50.0, 200.0
"""Calls of one phone a second: a chunk of 1 MiB each. Strangers share those of their network."""
OF_TOKEN = 20
"""All phones with one token have so many times the calls of one, however they connect."""
SECONDS = {"CheckIn": 15.0, "Download": 15.0, "Upload": 240.0, "Report": 240.0, "Heartbeat": 15.0}
"""Seconds in which the request of a call must be there: a chunk has those of the slowest line."""
TAKEN = {**dict.fromkeys(SECONDS, 15.0), "Download": 240.0}
"""Seconds in which the answer of a call must be taken: a chunk has those of the slowest line."""
MOST = {"connection": 16, "token": 256, "gateway": 1024}
"""Calls open at a time: of one connection, of all phones with one token, of all."""
CONNECTIONS = 8192
"""Connections at most, and a quarter of the open-file limit: one has three, the rest is ours."""
_PEERS = 1 << 14
_WORKERS = 32
_APART = {"Report": 4}
"""Calls with threads of their own, so many: one reply is judged at a time, all reports wait."""

Context = grpc.aio.ServicerContext[Any, Any]

_log = logs.logger("phones")


class Phones:
    """Checks who calls, how often and how many at a time; gives what goes wrong its status code."""

    def __init__(self, gateway: Gateway, tokens: Mapping[str, Token]) -> None:
        self._tokens, self._clock = tokens, gateway.clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._open = Occupancy()
        workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="rpc")
        apart = {name: ThreadPoolExecutor(most, name) for name, most in _APART.items()}
        self._threads = {name: apart.get(name, workers) for name in SECONDS}
        deliveries, blobs = gateway.deliveries, gateway.blobs
        self._answers: dict[str, tuple[Callable[[], Any], Callable[[Any, Token], Any]]] = {
            "CheckIn": (pb.CheckInRequest, gateway.check_ins.answer),
            "Download": (pb.DownloadRequest, lambda own, _: blobs.chunk(own.sha256, own.offset)),
            "Upload": (pb.Chunk, deliveries.upload),
            "Report": (pb.ReportRequest, deliveries.report),
            "Heartbeat": (pb.HeartbeatRequest, deliveries.heartbeat),
        }

    def add_to(self, server: grpc.aio.Server, door: Door) -> None:
        """Serve the service Phones of proto/device.proto to those who come by a door."""
        service = pb.DESCRIPTOR.services_by_name["Phones"].full_name
        handlers: dict[str, Any] = {
            # As streams of one request and one answer: a handler of one waits for either however
            # long it takes.
            name: grpc.stream_stream_rpc_method_handler(
                partial(self._call, door, name),
                response_serializer=lambda own: own.SerializeToString(),
            )
            for name in self._answers
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def _answer(self, name: str, data: bytes, token: Token) -> Any:
        """The answer to a request. Raises WireError for bytes that are none."""
        kind, answer = self._answers[name]
        return answer(parse(kind(), data, protocol.MAX_MESSAGE), token)

    async def _call(
        self, door: Door, name: str, requests: AsyncIterator[bytes], context: Context
    ) -> None:
        token, peer = _token(self._tokens, context), context.peer()
        visitor = door.visitor(int(peer.rpartition(":")[2]))
        if visitor is None:  # its connection is over, or it is of this machine and not by the door
            raise asyncio.CancelledError
        # Of those with a token each connection counts: many phones share a router's address.
        allowed = self._allowed(peer if token else visitor.network)
        if token is None:
            if not allowed:  # an answer to each would be what it asks for
                visitor.end()
            text = "this gateway does not know the token"
            await _end(context, grpc.StatusCode.UNAUTHENTICATED, text)
        visitor.known()
        if not (allowed and self._allowed(f"token {token.owner}", OF_TOKEN)):
            await _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait a second")
        groups = {peer: "connection", f"token {token.owner}": "token", "": "gateway"}
        call = Occupant({group: MOST[kind] for group, kind in groups.items()}, lambda: None)
        try:
            async with _waiting(call, SECONDS[name]):
                data = await self._heard(call, requests)
            with visitor.at_work():
                answer = await asyncio.get_running_loop().run_in_executor(
                    self._threads[name], self._answer, name, data, token
                )
            self._open.wait(call)
            try:
                async with _waiting(call, TAKEN[name]):
                    await context.write(answer)
            except TimeoutError:  # it stays in memory for as long as there is the connection
                visitor.end()
                raise asyncio.CancelledError from None
        except (_FullError, WireError, KeyError, OSError) as error:
            await _end(context, *_status(error))
        finally:
            self._open.leave(call)

    async def _heard(self, call: Occupant, requests: AsyncIterator[bytes]) -> bytes:
        """The request of a call. Raises _FullError, and WireError where there is none."""
        if not self._open.enter(call):
            raise _FullError
        async for data in requests:
            self._open.settle(call)
            return data
        raise WireError("a call has a request")

    def _allowed(self, peer: str, times: int = 1) -> bool:
        now, rate, burst = self._clock(), times * RATE, times * BURST
        bucket, allowed = self._buckets.get(peer, Bucket(burst, now)).take(now, rate, burst)
        self._buckets[peer] = bucket
        self._buckets.move_to_end(peer)
        if len(self._buckets) > _PEERS:
            self._buckets.popitem(last=False)
        return allowed


def _waiting(call: Occupant, seconds: float) -> asyncio.Timeout:
    """The time that a call may wait for its caller; the end of the call ends it at once."""
    limit = asyncio.timeout(seconds)

    def end() -> None:
        if not limit.expired():
            limit.reschedule(0.0)

    call.end = end
    return limit


class _FullError(Exception):
    """As many calls are at work as may be. Never leaves this module."""


def _status(error: _FullError | WireError | KeyError | OSError) -> tuple[grpc.StatusCode, str]:
    """The status code of a call that went wrong, and its words."""
    match error:
        case _FullError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls are open: wait a second"
        case TimeoutError():
            return grpc.StatusCode.DEADLINE_EXCEEDED, "the call's request did not come in time"
        case PermissionError():
            return grpc.StatusCode.UNAUTHENTICATED, str(error)
        case KeyError():
            return grpc.StatusCode.NOT_FOUND, "this blob is not offered (any more)"
        case WireError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case _:
            _log.error("disk", error=str(error.strerror))
            return grpc.StatusCode.UNAVAILABLE, "the gateway's disk fails"


def _token(tokens: Mapping[str, Token], context: Context) -> Token | None:
    metadata: Any = context.invocation_metadata()
    return who(tokens, str(dict(metadata or ()).get("authorization", "")))


async def _end(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort raises")


def serve_phones(
    gateway: Gateway, tokens: Mapping[str, Token], address: str, certificate: Path, key: Path
) -> rpc.TlsServer:
    """A server that is started. Raises ConfigError when it cannot be."""
    return rpc.tls_server(
        address,
        certificate,
        key,
        most_bytes=protocol.MAX_MESSAGE,
        connections=min(CONNECTIONS, open_files() // 4),
        add=Phones(gateway, tokens).add_to,
    )
