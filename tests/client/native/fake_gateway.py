"""A gateway for native phones that does what a test says, and a line to it that can be cut."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.config.run import RunConfig
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc
from corolla.proto import update_pb2 as updates
from corolla.server.gateway.uploads import Upload
from corolla.wire import messages
from corolla.wire.parsing import parse
from experiments.bench.fuzz_native import manifest
from tests.server.gateway import gateways
from tests.strategies import tiny

LEASE = "ab" * 16
CONFIG: RunConfig = tiny.config("fedavg", rank=1, alpha=1.0, deadline=30.0)


# --- a bundle -------------------------------------------------------------------------------------


def make_bundle(
    folder: Path, files: dict[str, bytes], key: Ed25519PrivateKey, **changes: object
) -> Path:
    """A signed bundle whose one program has the files fp32.pte and base.ptd, of any content."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    raw = json.dumps({**manifest(files), **changes}).encode()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sig").write_bytes(key.sign(raw))
    return folder


def public_half(key: Ed25519PrivateKey, path: Path) -> Path:
    """The file that phones are given."""
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path


# --- the gateway ----------------------------------------------------------------------------------


@dataclass
class Fake(device_pb2_grpc.PhonesServicer):
    """Leases one task after another to whoever has its bundle, without a deadline of its own."""

    bundle: Path
    tasks: list[messages.Task] = field(default_factory=list)
    cached: list[pb.Blob] = field(default_factory=list)
    policy: pb.Policy = field(default_factory=pb.Policy)
    lease_seconds: float = 5.0
    deadline: float = 30.0
    most_upload: int = 8 << 20
    accept: bool = True
    wanted: bool = True
    spoil: Callable[[pb.Chunk], None] = lambda chunk: None
    header: Callable[[bytes], bytes] = lambda header: header
    """What is offered as the header of a task."""
    received: Callable[[], int] | None = None
    """What is said to have come of an upload, whatever came."""
    before: Callable[[str, grpc.ServicerContext], None] = lambda name, context: None
    """Called with the name of each call before it is answered."""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    reports: list[tuple[str, updates.Reply]] = field(default_factory=list)
    uploaded: bytes = b""

    def __post_init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self._upload: Upload | None = None
        self._lease = 0
        self.share(self.bundle)

    def share(self, bundle: Path) -> None:
        """Offer this bundle from now on."""
        made = pb.Manifest()
        for path in sorted(bundle.iterdir()):
            data = path.read_bytes()
            chunks = b"".join(
                hashlib.sha256(data[at : at + protocol.CHUNK]).digest()
                for at in range(0, len(data), protocol.CHUNK)
            )
            blob = self.put(data)
            made.files.append(pb.Manifest.File(path=path.name, blob=blob, chunks=chunks))
        self.model = self.put(made.SerializeToString())

    def put(self, data: bytes) -> pb.Blob:
        """Offer bytes."""
        self.blobs[protocol.sha256(data)] = data
        return pb.Blob(sha256=protocol.sha256(data), size=len(data))

    def count(self, name: str) -> int:
        """How often a call came."""
        return sum(call == name for call, _ in self.asked)

    def downloads(self, path: Path) -> list[int]:
        """The offsets that were asked for of a file."""
        name = protocol.sha256(path.read_bytes())
        return [r.offset for call, r in self.asked if call == "Download" and r.sha256 == name]

    def _came(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self.asked.append((name, request))
        if ("authorization", f"Bearer {gateways.TOKEN}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this gateway does not know the token")
        self.before(name, context)

    def CheckIn(self, request: Any, context: Any) -> pb.CheckInResponse:  # noqa: N802
        self._came("CheckIn", request, context)
        retry = protocol.window(0.05, 0.15)
        assignment = pb.Assignment(program="fp32", method="grad", rank=1, length=32)
        if request.manifest != self.model.sha256:
            refusal = pb.Refusal(
                reason=pb.Refusal.REASON_MODEL, base_model=self.model, assignment=assignment
            )
            return pb.CheckInResponse(refusal=refusal, retry=retry, policy=self.policy)
        if not self.tasks:
            refusal = pb.Refusal(reason=pb.Refusal.REASON_NO_TASK, text="no round")
            return pb.CheckInResponse(refusal=refusal, retry=retry, policy=self.policy)
        packet = messages.pack_task(self.tasks[0])
        lease = pb.Lease(
            id=f"{self._lease:032x}",
            client=f"gate/{request.device}",
            task=self.put(self.header(packet.header)),
            payload=self.put(packet.payload) if packet.payload else pb.Blob(),
            cached=self.cached,
            strategy="fedavg",
            phase="train",
            policy=self.policy,
            seconds=self.lease_seconds,
            deadline_seconds=self.deadline,
            max_upload_bytes=self.most_upload,
            assignment=assignment,
        )
        return pb.CheckInResponse(lease=lease, retry=retry, policy=self.policy)

    def next_lease(self) -> None:
        """What is leased from now on has another id: the old lease is over."""
        self._lease += 1
        if self._upload:
            self._upload.close()
        self._upload = None

    def Download(self, request: Any, context: Any) -> pb.Chunk:  # noqa: N802
        self._came("Download", request, context)
        data = self.blobs.get(request.sha256)
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "this blob is not offered (any more)")
            raise AssertionError
        at = request.offset
        chunk = protocol.chunk(data[at : at + protocol.CHUNK], at, len(data))
        self.spoil(chunk)
        return chunk

    def Upload(self, request: Any, context: Any) -> pb.UploadStatus:  # noqa: N802
        self._came("Upload", request, context)
        if self.received:
            return pb.UploadStatus(received=self.received())
        if self._upload is None:
            self._upload = Upload(self.bundle.parent, self.most_upload)
        received = self._upload.add(request)
        self.uploaded = self._upload.payload()
        return pb.UploadStatus(received=received)

    def Report(self, request: Any, context: Any) -> pb.Acknowledgement:  # noqa: N802
        self._came("Report", request, context)
        reply = parse(updates.Reply(), request.reply, protocol.MAX_REPLY)
        self.reports.append((request.lease, reply))
        self.tasks = self.tasks[1:]
        self.next_lease()
        good = self.accept and not reply.error
        why = reply.error or ("" if good else "too good to be true")
        return pb.Acknowledgement(accepted=good, why=why, retry=protocol.window(0.05, 0.1))

    def Heartbeat(self, request: Any, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        self._came("Heartbeat", request, context)
        return pb.HeartbeatResponse(wanted=self.wanted, seconds=self.lease_seconds)


@contextmanager
def offering(folder: Path, fake: Fake) -> Iterator[int]:
    """The port at which a fake gateway serves; `folder`/certs has the certificates."""
    own = folder / "certs"
    if not own.exists():
        gateways.certificates(own)
    with serving(fake, own) as port:
        yield port


@contextmanager
def serving(service: device_pb2_grpc.PhonesServicer, certs: Path) -> Iterator[int]:
    """The port at which a service for phones serves, with a gateway's certificates."""
    options = [("grpc.max_receive_message_length", protocol.MAX_MESSAGE)]
    server = grpc.server(ThreadPoolExecutor(8), options=options)
    pair = ((certs / "gateway.key").read_bytes(), (certs / "gateway.pem").read_bytes())
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    device_pb2_grpc.add_PhonesServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


# --- a line that can be cut -----------------------------------------------------------------------


class Line:
    """A TCP proxy to a port of this machine; `cut` ends all that goes through it."""

    def __init__(self, port: int, host: str = "localhost") -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.down = False
        self.allowance = {"up": float("inf"), "down": float("inf")}
        """Bytes in each direction after which the line cuts itself."""
        self._server = socket.create_server((host, 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        self.down = True
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._open.clear()

    def restore(self) -> None:
        self.allowance = {"up": float("inf"), "down": float("inf")}
        self.down = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                phone, _ = self._server.accept()
                if self.down:
                    phone.close()
                    continue
                gateway = socket.create_connection(("localhost", self._target))
                with self._lock:
                    self._open += [phone, gateway]
                for ends in ((phone, gateway, "up"), (gateway, phone, "down")):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.allowance[way] -= len(data)
                if self.allowance[way] < 0:
                    self.cut()
                    return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
