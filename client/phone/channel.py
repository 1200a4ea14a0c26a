"""A phone's calls to its gateway: a limit of time on each, another try where one fails."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any, TypeVar, cast

import grpc

from corolla.client.phone.clock import Clock
from corolla.errors import ConfigError, StoppedError
from corolla.host.text import one_line
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc

R = TypeVar("R")
FOREVER = float("inf")
"""Deadline of a call that is tried again until it has an answer."""
_CALL_SECONDS = 30.0
"""Seconds after which a call has failed."""
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


class SessionOverError(Exception):
    """The gateway does not want a session's result. Never leaves this package."""


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
    bytes: int = 0
    """Bytes up and down, of calls that were answered, since the last entry of the history."""

    def __post_init__(self) -> None:
        self.stub: Any = device_pb2_grpc.PhonesStub(self.channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {self.token}"),)
        self._random = random.Random(os.urandom(16))  # noqa: S311 - jitter

    def call(
        self,
        method: Callable[..., R],
        request: Any,
        deadline: float = FOREVER,
        slow: bool = False,
    ) -> R:
        """The answer to a call.

        Raises SessionOverError when the gateway or the deadline has ended the session, ConfigError
        for what only the owner can mend; where `slow`, SlowCallError for a call that took too long.
        """
        pause, longest = self.pauses
        if deadline == FOREVER:
            deadline = self.clock.now() + self.patience
        while True:
            try:
                found: Any = method(request, metadata=self._metadata, timeout=_CALL_SECONDS)
                self.bytes += request.ByteSize() + found.ByteSize()
                return cast(R, found)
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

    def once(self, method: Callable[..., R], request: Any, seconds: float) -> R | None:
        """The answer to a call that is not tried again, or None; its bytes do not count."""
        try:
            return method(request, metadata=self._metadata, timeout=seconds)
        except grpc.RpcError:
            return None

    def download(self, request: pb.DownloadRequest, deadline: float = FOREVER) -> pb.Chunk:
        """A chunk of a blob. Raises StoppedError when the phone was stopped."""
        if self.stop.is_set():  # a base model has many chunks
            raise StoppedError("stopped")
        chunk: pb.Chunk = self.call(self.stub.Download, request, deadline)
        return chunk

    def wait(self, seconds: float) -> None:
        """Raises StoppedError as soon as the phone is stopped."""
        if self.clock.wait(self.stop, seconds):
            raise StoppedError("stopped")

    def pause(self, window: pb.RetryWindow) -> float:
        """Seconds until the next check-in: of the gateway's window, at random."""
        return protocol.wait(window, self._random.random())

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
