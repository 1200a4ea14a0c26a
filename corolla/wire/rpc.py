"""gRPC in one place: a trainer on a unix socket, phones over TLS. Imports neither torch nor flwr.

A trainer is whatever answers packets: a daemon with a model, a gateway with its phones. It serves
on a socket that its own user alone can open.
"""

import asyncio
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from corolla.errors import ConfigError, CorollaError, PeerError
from corolla.host.door import Door
from corolla.proto import device_pb2, device_pb2_grpc
from corolla.wire.packet import Packet

LONGEST_PATH = 103
"""Bytes of a socket's path that every system takes (Linux 107, macOS 103)."""

_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
"""Beyond the usual 4 MB: both ends of the socket are processes of one user."""

_SERVER = (
    ("grpc.so_reuseport", 0),  # or two servers would share a port, and half the calls be lost
    ("grpc.keepalive_time_ms", 20_000),  # or calls of a peer that vanished would stay
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 128),  # of a connection, also calls that nobody is told of
    ("grpc.server_handshake_timeout_ms", 10_000),  # two minutes, else, for a silent stranger
)

_QUICK = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
"""A trainer that starts again is found within a second."""

Wanted = Callable[[], bool]
"""A function that says whether the caller still waits: it may be dead, or its time over."""


@dataclass(frozen=True)
class Waits:
    """Wanted, of a caller that waits until `deadline` (of time.monotonic) at most."""

    is_active: Wanted = lambda: True
    deadline: float = math.inf

    def __call__(self) -> bool:
        return self.is_active()

    def left(self) -> float:
        """Seconds that it still waits."""
        return self.deadline - time.monotonic()


FOREVER = Waits()


def serve_trainer(
    answer: Callable[[Packet, Waits], Packet], path: Path, workers: int = 1
) -> grpc.Server:
    """Answer packets on a socket, `workers` at a time; the others wait. Stop it with `stop`.

    A CorollaError that `answer` raises reaches the caller as PeerError. Raises ConfigError when
    there can be no such socket.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="trainer")
    server = grpc.server(pool, options=_UNLIMITED)
    add = device_pb2_grpc.add_TrainerServicer_to_server
    add(_Trainer(answer), server)  # type: ignore[no-untyped-call]
    path.unlink(missing_ok=True)  # of one that was killed
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigError(f"cannot serve on {path}: {error}") from error
    server.start()
    path.chmod(0o600)
    return server


def ask_trainer(path: Path, packet: Packet, seconds: float) -> Packet:
    """The answer of the trainer at a socket, which may still be starting.

    Raises PeerError, with `gone` when it was not there or ended before it had answered.
    """
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(f"unix:{path}", options=(*_UNLIMITED, *_QUICK)) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise PeerError(f"no trainer answers after {seconds:.0f} s", gone=True) from None
        request = device_pb2.Packet(header=packet.header, payload=packet.payload)
        stub = device_pb2_grpc.TrainerStub(channel)  # type: ignore[no-untyped-call]
        left = max(0.01, deadline - time.monotonic())
        try:
            found = stub.Answer(request, timeout=left)
        except grpc.RpcError as error:
            raise _peer_error(error, seconds) from error
    return Packet(found.header, found.payload)


@contextmanager
def private_socket(folder: Path, name: str = "trainer.sock") -> Iterator[Path]:
    """A path for a socket in a folder that only this user can enter; the socket is removed again.

    It lies in `folder`, or where that path is too long for a socket, in a new temporary folder.
    Raises ConfigError when that is too long as well.
    """
    inner = folder / "run"
    if len(os.fsencode(inner / name)) > LONGEST_PATH:
        with tempfile.TemporaryDirectory(prefix="corolla-") as short:  # mode 0700
            if len(os.fsencode(Path(short, name))) > LONGEST_PATH:
                raise ConfigError(f"{short} is too long for a socket: set TMPDIR to a short folder")
            yield Path(short, name)
        return
    inner.mkdir(mode=0o700, parents=True, exist_ok=True)
    inner.chmod(0o700)
    try:
        yield inner / name
    finally:
        (inner / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class TlsServer:
    """Serves calls over TLS, on an event loop in a thread of its own."""

    port: int
    stop: Callable[[], None]
    """Ends all calls; the port is free afterwards."""


def tls_server(
    address: str,
    certificate: Path,
    key: Path,
    *,
    most_bytes: int,
    connections: int,
    add: Callable[[grpc.aio.Server, Door], None],
) -> TlsServer:
    """A server that serves what `add` adds to it; a message has at most `most_bytes`.

    It has so many `connections` at a time, taken at a door that says whose a call is. Raises
    ConfigError when the address is taken or the files cannot be used.
    """
    options = (*_SERVER, *_longest(most_bytes))
    try:
        pair = (key.read_bytes(), certificate.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    taken = f"cannot serve at {address}: taken, or no address of this host"
    try:
        door = Door(address, connections)
    except OSError as error:
        raise ConfigError(taken) from error
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="calls", daemon=True)
    thread.start()

    async def begin() -> grpc.aio.Server:
        server = grpc.aio.server(options=options)
        add(server, door)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        await server.start()
        door.open(port)
        return server

    async def end(server: grpc.aio.Server) -> None:
        door.close()
        await server.stop(None)
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def stop() -> None:
        asyncio.run_coroutine_threadsafe(end(server), loop).result()
        close()

    try:
        server = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    except RuntimeError as error:
        door.close()
        close()
        raise ConfigError(taken) from error
    return TlsServer(door.port, stop)


def tls_channel(address: str, ca: Path | None, *, most_bytes: int) -> grpc.Channel:
    """A channel to a server whose certificate `ca` has signed (None: the system's)."""
    try:
        roots = ca.read_bytes() if ca else None
    except OSError as error:
        raise ConfigError(f"cannot read {ca}: {error.strerror}") from error
    options = (("grpc.max_reconnect_backoff_ms", 10_000), *_longest(most_bytes))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)


def _longest(bytes: int) -> tuple[tuple[str, int], ...]:
    """Options for messages of so many bytes, both ways; what is compressed counts as it was."""
    return ("grpc.max_receive_message_length", bytes), ("grpc.max_send_message_length", bytes)


@dataclass(frozen=True)
class Method:
    """A call of a service of device.proto, which gives its answer as bytes.

    Who calls counts them, and then their entries (see wire/parsing.py).
    """

    call: Callable[..., bytes]
    answer: type[Message]


class RawChannel:
    """A channel whose stubs have methods of the type Method."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: object,
        **options: Any,
    ) -> Method:
        """As that of a grpc.Channel, which generated stubs call."""
        call: Any = self._channel.unary_unary(path, request_serializer, None, **options)
        return Method(call, _answer(path))


def _answer(path: str) -> type[Message]:
    """The message that answers /SERVICE/METHOD of device.proto."""
    service, method = path.rpartition(".")[2].split("/")
    found = device_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    return GetMessageClass(found.output_type)


class _Trainer(device_pb2_grpc.TrainerServicer):
    def __init__(self, answer: Callable[[Packet, Waits], Packet]) -> None:
        self._answer = answer

    def Answer(  # noqa: N802 - its name in device.proto
        self, request: device_pb2.Packet, context: grpc.ServicerContext
    ) -> device_pb2.Packet:
        if not context.is_active():  # it waited for another, and its caller is gone
            return device_pb2.Packet()
        left = context.time_remaining()
        waits = Waits(context.is_active, math.inf if left is None else time.monotonic() + left)
        try:
            found = self._answer(Packet(request.header, request.payload), waits)
        except CorollaError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return device_pb2.Packet(header=found.header, payload=found.payload)


def _peer_error(error: grpc.RpcError, seconds: float) -> PeerError:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerError(f"the trainer is busy: no answer after {seconds:.0f} s")
    if code == grpc.StatusCode.UNAVAILABLE:
        return PeerError("the trainer ended before it had answered", gone=True)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return PeerError(details or "the trainer refuses the task")
    return PeerError(f"the trainer failed: {code.name}")  # its details may hold data
