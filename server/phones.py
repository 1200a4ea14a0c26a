"""The service that phones call: TLS, a token on every call, limits; then server/gateway.py."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc

from corolla import calls, logs, rpc
from corolla.errors import WireError
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc
from corolla.server.gateway import Gateway
from corolla.server.leases import Bucket
from corolla.server.tokens import Token, who

RATE, BURST = 50.0, 200.0
"""Calls of one phone a second: a chunk of 1 MiB each. Strangers share those of their address."""
_PEERS = 1 << 14
_WORKERS = 8

R = TypeVar("R")
_log = logs.logger("phones")


class Phones(device_pb2_grpc.PhonesServicer):
    """Checks who calls and how often, and gives what goes wrong its status code."""

    def __init__(self, gateway: Gateway, tokens: Mapping[str, Token]) -> None:
        self._gateway, self._tokens = gateway, tokens
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def CheckIn(  # noqa: N802 - these names are in device.proto
        self, request: pb.CheckInRequest, context: grpc.ServicerContext
    ) -> pb.CheckInResponse:
        return self._call(context, lambda token: self._gateway.check_in(request, token))

    def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: grpc.ServicerContext
    ) -> pb.Chunk:
        return self._call(context, lambda _: self._gateway.download(request))

    def Upload(  # noqa: N802
        self, request: pb.Chunk, context: grpc.ServicerContext
    ) -> pb.UploadStatus:
        return self._call(context, lambda token: self._gateway.upload(request, token))

    def Report(  # noqa: N802
        self, request: pb.ReportRequest, context: grpc.ServicerContext
    ) -> pb.Acknowledgement:
        return self._call(context, lambda token: self._gateway.report(request, token))

    def Heartbeat(  # noqa: N802
        self, request: pb.HeartbeatRequest, context: grpc.ServicerContext
    ) -> pb.HeartbeatResponse:
        return self._call(context, lambda token: self._gateway.heartbeat(request, token))

    def _call(self, context: grpc.ServicerContext, answer: Callable[[Token], R]) -> R:
        metadata = dict(context.invocation_metadata())
        token = who(self._tokens, str(metadata.get("authorization", "")))
        # Of those with a token each connection counts: many phones share a router's address.
        peer = context.peer()
        if not self._allowed(peer if token else peer.rpartition(":")[0]):
            _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait a second")
        if token is None:
            _end(context, grpc.StatusCode.UNAUTHENTICATED, "this gateway does not know the token")
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

    def _allowed(self, peer: str) -> bool:
        now = time.monotonic()
        with self._lock:
            bucket, allowed = self._buckets.get(peer, Bucket(BURST, now)).take(now, RATE, BURST)
            self._buckets[peer] = bucket
            self._buckets.move_to_end(peer)
            if len(self._buckets) > _PEERS:
                self._buckets.popitem(last=False)
        return allowed


def _end(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")


def serve_phones(
    gateway: Gateway, tokens: Mapping[str, Token], address: str, certificate: Path, key: Path
) -> tuple[grpc.Server, int]:
    """(a server that is started, its port). Raises ConfigError when it cannot be."""
    server, port = rpc.tls_server(
        address, certificate, key, workers=_WORKERS, most_bytes=calls.MAX_MESSAGE
    )
    add = device_pb2_grpc.add_PhonesServicer_to_server
    add(Phones(gateway, tokens), server)  # type: ignore[no-untyped-call]
    server.start()
    return server, port
