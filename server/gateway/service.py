"""The service that phones call: TLS, a token on every call, limits; then the gateway."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from corolla.errors import WireError
from corolla.host import logs
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc
from corolla.server.gateway.access import Token, who
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.leases import Bucket
from corolla.wire import rpc

RATE, BURST = 50.0, 200.0
"""Calls of one phone a second: a chunk of 1 MiB each. Strangers share those of their address."""
_PEERS = 1 << 14
_WORKERS = 32
_MOST_CALLS = 256

R = TypeVar("R")
_log = logs.logger("phones")


class Strangers(grpc.ServerInterceptor):
    """Turns calls without a token away before they are read.

    A usual handler holds a thread until its request has come: strangers would hold all of them.
    """

    def __init__(self, tokens: Mapping[str, Token], refuse: Callable[..., NoReturn]) -> None:
        self._tokens = tokens
        self._away: Any = grpc.stream_unary_rpc_method_handler(lambda _, context: refuse(context))

    def intercept_service(
        self, continuation: Callable[..., Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        known = _token(self._tokens, handler_call_details.invocation_metadata)
        return continuation(handler_call_details) if known else self._away


class Phones(device_pb2_grpc.PhonesServicer):
    """Checks who calls and how often, and gives what goes wrong its status code."""

    def __init__(self, gateway: Gateway, tokens: Mapping[str, Token]) -> None:
        self._check_ins, self._deliveries = gateway.check_ins, gateway.deliveries
        self._blobs, self._tokens, self._clock = gateway.blobs, tokens, gateway.clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def CheckIn(  # noqa: N802 - these names are in device.proto
        self, request: pb.CheckInRequest, context: grpc.ServicerContext
    ) -> pb.CheckInResponse:
        return self._call(context, lambda token: self._check_ins.answer(request, token))

    def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: grpc.ServicerContext
    ) -> pb.Chunk:
        return self._call(context, lambda _: self._blobs.chunk(request.sha256, request.offset))

    def Upload(  # noqa: N802
        self, request: pb.Chunk, context: grpc.ServicerContext
    ) -> pb.UploadStatus:
        return self._call(context, lambda token: self._deliveries.upload(request, token))

    def Report(  # noqa: N802
        self, request: pb.ReportRequest, context: grpc.ServicerContext
    ) -> pb.Acknowledgement:
        return self._call(context, lambda token: self._deliveries.report(request, token))

    def Heartbeat(  # noqa: N802
        self, request: pb.HeartbeatRequest, context: grpc.ServicerContext
    ) -> pb.HeartbeatResponse:
        return self._call(context, lambda token: self._deliveries.heartbeat(request, token))

    def _call(self, context: grpc.ServicerContext, answer: Callable[[Token], R]) -> R:
        token = _token(self._tokens, context.invocation_metadata())
        if token is None:  # it was in the file a moment ago
            self.refuse(context)
        # Of those with a token each connection counts: many phones share a router's address.
        self._limit(context, context.peer())
        try:
            return answer(token)
        except PermissionError as error:
            _end(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except KeyError:
            _end(context, grpc.StatusCode.NOT_FOUND, "this blob is not offered (any more)")
        except WireError as error:
            _end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except OSError as error:
            _log.error("disk", error=str(error.strerror))
            _end(context, grpc.StatusCode.UNAVAILABLE, "the gateway's disk fails")

    def refuse(self, context: grpc.ServicerContext) -> NoReturn:
        """End a stranger's call."""
        self._limit(context, context.peer().rpartition(":")[0])
        _end(context, grpc.StatusCode.UNAUTHENTICATED, "this gateway does not know the token")

    def _limit(self, context: grpc.ServicerContext, peer: str) -> None:
        if not self._allowed(peer):
            _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait a second")

    def _allowed(self, peer: str) -> bool:
        now = self._clock()
        with self._lock:
            bucket, allowed = self._buckets.get(peer, Bucket(BURST, now)).take(now, RATE, BURST)
            self._buckets[peer] = bucket
            self._buckets.move_to_end(peer)
            if len(self._buckets) > _PEERS:
                self._buckets.popitem(last=False)
        return allowed


def _token(tokens: Mapping[str, Token], metadata: Iterable[Any]) -> Token | None:
    return who(tokens, str(dict(metadata).get("authorization", "")))


def _end(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")


def serve_phones(
    gateway: Gateway, tokens: Mapping[str, Token], address: str, certificate: Path, key: Path
) -> tuple[grpc.Server, int]:
    """(a server that is started, its port). Raises ConfigError when it cannot be."""
    phones = Phones(gateway, tokens)
    server, port = rpc.tls_server(
        address,
        certificate,
        key,
        workers=_WORKERS,
        most_bytes=protocol.MAX_MESSAGE,
        most_calls=_MOST_CALLS,
        interceptors=[Strangers(tokens, phones.refuse)],
    )
    add = device_pb2_grpc.add_PhonesServicer_to_server
    add(phones, server)  # type: ignore[no-untyped-call]
    server.start()
    return server, port
