"""A phone's calls to its gateway: a limit of time on each, another try where one fails."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import grpc

from corolla.client.phone.clock import Clock
from corolla.client.phone.meter import LEAST_SECONDS, Meter, SessionOverError, UsedUpError
from corolla.errors import ConfigError, StoppedError, WireError
from corolla.host.text import one_line
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc
from corolla.wire.parsing import parse
from corolla.wire.rpc import Method, RawChannel

FOREVER = float("inf")
"""Deadline of a call that is tried again until it has an answer."""
_CALL_SECONDS = 30.0
"""Seconds after which a call has failed."""
_OVERHEAD = 256
"""Bytes of a call beside its messages, about: frames of HTTP/2 and TLS, headers, the token."""
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


class SlowCallError(Exception):
    """A call took too long: ask for less. Never leaves this package."""


@dataclass
class Caller:
    """Makes calls until they have an answer, with growing pauses, for as long as it makes sense."""

    channel: grpc.Channel
    token: str
    pauses: tuple[float, float]
    """Seconds after a call that failed: the first pause, and the longest."""
    stop: Event
    tell: Callable[[str], None]
    """Told what the owner may want to know."""
    clock: Clock = field(default_factory=Clock)
    patience: float = FOREVER
    """Seconds for which a call without a deadline is tried again."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.clock)
        self.stub: Any = device_pb2_grpc.PhonesStub(RawChannel(self.channel))  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {self.token}"),)
        self._random = random.Random(os.urandom(16))  # noqa: S311 - jitter

    def call(
        self,
        method: Method,
        request: Any,
        deadline: float = FOREVER,
        slow: bool = False,
        coming: int = 0,
    ) -> Any:
        """The answer to a call, of about `coming` bytes.

        Raises SessionOverError when the gateway, the deadline or a limit of the day has ended the
        session, or what comes is no answer, ConfigError for what only the owner can mend; where
        `slow`, SlowCallError for a call that took too long.
        """
        pause, longest = self.pauses
        if deadline == FOREVER:
            deadline = self.clock.now() + self.patience
        while True:
            left = self.meter.ask(request.ByteSize() + _OVERHEAD + coming)
            try:
                return self._made(method, request, min(_CALL_SECONDS, left))
            except WireError as error:
                raise SessionOverError(f"the gateway sends what cannot be read: {error}") from error
            except grpc.RpcError as error:
                code, details = error.code(), one_line(error.details() or "", protocol.MAX_TEXT)
            self._refuse_final(code, details)
            if slow and code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise SlowCallError
            if self.clock.now() + pause > deadline:
                raise SessionOverError(f"no connection before the deadline: {code.name}")
            self.tell(f"no answer, trying again: {code.name}")
            self.wait(pause * (0.5 + self._random.random()))
            pause = min(2 * pause, longest)

    def last_word(self, method: Method, request: Any, deadline: float = FOREVER) -> Any:
        """The answer to a call that ends a session; it gets one try where the day is used up.

        A few hundred bytes then free the gateway from waiting. Raises what `call` raises.
        """
        try:
            return self.call(method, request, deadline)
        except UsedUpError:
            try:
                return self._made(method, request, LEAST_SECONDS)
            except (grpc.RpcError, WireError):
                pass
            raise

    def once(self, method: Method, request: Any, seconds: float) -> Any:
        """The answer to a call that is not tried again, or None."""
        try:
            return self._made(method, request, min(seconds, self.meter.ask()))
        except (grpc.RpcError, UsedUpError, WireError):
            return None

    def _made(self, method: Method, request: Any, seconds: float) -> Any:
        """One try of a call, which counts whatever comes of it. Raises WireError for no answer."""
        began, size = self.clock.now(), request.ByteSize() + _OVERHEAD
        try:
            data = method.call(request, metadata=self._metadata, timeout=seconds)
            size += len(data)
            return parse(method.answer(), data, protocol.MAX_MESSAGE)
        except grpc.RpcError as error:
            size += len((error.details() or "").encode())
            raise
        finally:
            self.meter.count(size, self.clock.now() - began)

    def download(
        self, request: pb.DownloadRequest, size: int, deadline: float = FOREVER
    ) -> pb.Chunk:
        """A chunk of a blob, of `size` bytes. Raises StoppedError when the phone was stopped."""
        if self.stop.is_set():  # a base model has many chunks
            raise StoppedError("stopped")
        chunk: pb.Chunk = self.call(self.stub.Download, request, deadline, coming=size)
        return chunk

    def wait(self, seconds: float) -> None:
        """Raises StoppedError as soon as the phone is stopped."""
        if self.clock.wait(self.stop, seconds):
            raise StoppedError("stopped")

    def pause(self, window: pb.RetryWindow) -> float:
        """Seconds until the next check-in: of the gateway's window, at random, but not at once."""
        return max(self.least_pause, protocol.wait(window, self._random.random()))

    @property
    def least_pause(self) -> float:
        """Seconds between two check-ins, whatever a gateway says: as after two failures."""
        return 2 * self.pauses[0]

    def _refuse_final(self, code: grpc.StatusCode, details: str) -> None:
        """Raises for a failure that another try would not change."""
        if code in _FINAL:
            raise ConfigError(f"the gateway refuses: {details}")
        if "CERTIFICATE_VERIFY_FAILED" in details:
            raise ConfigError(
                "the gateway's certificate is not signed by --root-certificates, or is of "
                "another host or time"
            )
        if code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
            raise SessionOverError(details)
