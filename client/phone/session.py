"""A phone's half of proto/device.proto: it dials in, trains when asked, reports, comes back.

Needs grpc, protobuf and numpy; what trains is behind PhoneTrainer. It survives whatever ends a
call: a network that is cut, a gateway that starts again, its own death (a reply that was not yet
delivered waits on the disk).
"""

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import grpc

from corolla.client.phone import policies
from corolla.client.phone.downloads import fetch, fetch_model, verified
from corolla.client.phone.policies import NO_LIMITS, Limits
from corolla.errors import ConfigError, CorollaError, DataError, StoppedError, WireError
from corolla.host import logs
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc, update_pb2
from corolla.wire.packet import Packet

R = TypeVar("R")
_SECONDS = 30.0
"""Of one call, at most."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_EVERY = 0.5
"""Seconds between two looks at the device's conditions, while it trains."""
_LOOK = 30.0
"""At most between two looks at the device's conditions, before any gateway has said when."""
_CAPABILITIES = frozenset(update_pb2.Capabilities.DESCRIPTOR.fields_by_name)
_LARGEST = 8 << 30
_SMALLEST = 1 << 16
"""Bytes of a chunk on the slowest line."""
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)

_log = logs.logger("phone")


class PhoneTrainer(Protocol):
    """What trains on a phone: torch, or a native runtime."""

    def examples(self) -> int:
        """How many it may train on, at most."""

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        """Of the cached groups of a run (group → content id) those that are not held here."""

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        """The reply, under that name, to a task whose missing groups are in its payload.

        `model` is the folder of the gateway's base model, None where the owner chose one. Ends
        within a step once `wanted` is false. Never raises for a task that cannot be done: that is
        an error in the reply.
        """


@dataclass(frozen=True)
class Settings:
    """What a phone's owner decides."""

    device: str
    token: str
    state: Path
    own_model: bool = True
    conditions: Callable[[], Mapping[str, Any]] = lambda: {"charging": True, "idle": True}
    """Fields of the message Capabilities, asked for anew each time."""
    pauses: tuple[float, float] = (_FIRST_PAUSE, _LONGEST_PAUSE)
    """Seconds after a call that failed: the first, and the longest."""
    limits: Limits = NO_LIMITS


class _Over(Exception):  # noqa: N818 - no error: the session has ended
    """Ends a session: the gateway does not want its result. Never leaves this module."""


class _Slow(Exception):  # noqa: N818 - it asks for a smaller chunk
    """A call took too long. Never leaves this module."""


@dataclass
class Phone:
    """Dials one gateway. `stop` ends it, also in the midst of training."""

    settings: Settings
    channel: grpc.Channel
    trainer: PhoneTrainer
    stop: threading.Event = field(default_factory=threading.Event)
    say: Callable[[str], None] = lambda line: None
    """Told what its owner may want to know, a line each, nothing twice in a row."""
    done: int = 0
    """Updates that were accepted."""

    def __post_init__(self) -> None:
        protocol.check_device(self.settings.device)
        self._random = random.Random(os.urandom(16))  # noqa: S311 - jitter
        self._stub: Any = device_pb2_grpc.PhonesStub(self.channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {self.settings.token}"),)
        self._state = self.settings.state
        self._state.mkdir(parents=True, exist_ok=True)
        self._told = ""
        self._policy: bytes | None = None
        self._window = protocol.window(_LOOK / 2, _LOOK)
        self._bytes = 0  # up and down, since the last entry of the history
        self._whole: Path | None = None  # the base model that this process has checked

    def run(self, rounds: int = 0, once: bool = False) -> None:
        """Serve until `rounds` updates were accepted (0: for ever), or for one check-in.

        Raises ConfigError for what only the owner can mend, StoppedError when `stop` is set.
        """
        while not (rounds and self.done >= rounds):
            pause = self.visit()
            if once:
                return
            if not (rounds and self.done >= rounds):
                self._wait(pause)

    def visit(self) -> float:
        """Check in once and do what there is; the seconds until the next time."""
        try:
            return self._visit()
        except OSError as error:  # a full disk: its owner may make room
            self._tell(f"this device fails: {error.strerror}")
            return self.settings.pauses[1]

    def _visit(self) -> float:
        device, examples = self.settings.conditions(), self.trainer.examples()
        policy, now = self.policy(), time.time()
        lacks = policies.before_check_in(policy, device, examples, self.history(), now)
        if lacks:
            self._tell(f"waiting: {policies.in_words(lacks)}")
            return protocol.wait(self._window, self._random.random())
        found = self._check_in(device, examples)
        retry = self._window = found.retry
        self._keep(found.policy)
        if found.WhichOneof("answer") == "lease":
            with logs.bind(client=found.lease.client):
                try:
                    retry = self._session(found.lease)
                except _Over as over:
                    self._tell(f"dropped: {over}")
                except WireError as error:
                    self._tell(f"the gateway sends what cannot be read: {error}")
        else:
            refusal = found.refusal
            if refusal.reason == pb.Refusal.REASON_PROTOCOL:
                raise ConfigError(f"the gateway refuses: {protocol.one_line(refusal.text)}")
            if refusal.reason == pb.Refusal.REASON_MODEL:
                return self._get_model(refusal)
            self._tell(f"waiting: {protocol.one_line(refusal.text)}")
            if refusal.reason == pb.Refusal.REASON_NAME:  # until its holder is forgotten
                return self.settings.pauses[1]
        return protocol.wait(retry, self._random.random())

    # --- the base model ---------------------------------------------------------------------------

    def _get_model(self, refusal: pb.Refusal) -> float:
        if self.settings.own_model or not refusal.base_model.size:
            raise ConfigError(f"{protocol.one_line(refusal.text)}: name one with --model")
        try:
            folder = fetch_model(refusal.base_model, self._state / "models", self._download)
        except _Over:
            return self.settings.pauses[0]
        except WireError as error:
            self._tell(f"the gateway's base model is refused: {error}")
            return self.settings.pauses[1]
        self._note(policies.Entry(time.time(), "", 0, bytes=self._bytes))
        self._tell(f"base model {folder.name[:12]} is here")
        (self._state / "model").write_text(folder.name)
        self._whole = folder
        return 0.0

    def _model(self) -> Path | None:
        """The gateway's base model, if it is here and whole; None: an own one, or none yet."""
        if self._whole is None and not self.settings.own_model:
            try:
                name = protocol.check_sha256((self._state / "model").read_text())
            except (OSError, WireError):
                return None
            folder = self._state / "models" / name
            self._whole = folder if verified(folder) else None
        return self._whole

    # --- a session --------------------------------------------------------------------------------

    def _check_in(self, device: Mapping[str, Any], examples: int) -> pb.CheckInResponse:
        model = self._model()
        told = {name: own for name, own in device.items() if name in _CAPABILITIES}
        request = pb.CheckInRequest(
            protocol=protocol.PROTOCOL,
            device=self.settings.device,
            capabilities=update_pb2.Capabilities(**told),
            num_examples=examples,
            own_model=self.settings.own_model,
            manifest=model.name if model else "",
            log_version=self._read("log"),
        )
        found: pb.CheckInResponse = self._call(self._stub.CheckIn, request)
        return found

    def _session(self, lease: pb.Lease) -> pb.RetryWindow:
        """Fetch, train, deliver; the window of the gateway's last word."""
        kept = self._state / f"reply-{protocol.check_id(lease.id)}"
        if not lease.client.endswith(f"/{self.settings.device}"):
            raise WireError("the lease is of another device")
        deadline = time.monotonic() + max(0.0, lease.deadline_seconds)
        task, accepted = update_pb2.Task(), False
        with self._alive(lease) as alive:
            try:
                task, unread = self._task(lease, deadline)
                packet = unread or _read_packet(kept)  # of this lease, by a process that died since
                if packet is None:
                    packet = self._train(lease, task, alive, deadline)
                    self._clear()
                    _write_packet(kept, packet)
                acknowledged = self._deliver(lease, packet, deadline)
                accepted = acknowledged.accepted
                self._clear()
            except _Over:
                self._clear()
                raise
            finally:
                seconds, battery = alive.spent()
                entry = policies.Entry(time.time(), task.run_id, task.round, seconds, self._bytes)
                self._note(replace(entry, battery=battery, accepted=accepted))
        if acknowledged.accepted:
            self.done += 1
            if task.HasField("log"):
                (self._state / "log").write_text(protocol.check_id(task.log.version))
        elif protocol.read_reply(packet).missing:  # this device has forgotten something
            (self._state / "log").unlink(missing_ok=True)
        why = protocol.one_line(acknowledged.why)
        word = "accepted" if acknowledged.accepted else f"not accepted: {why}"
        self._tell(f"round {task.round} as {protocol.one_line(lease.client)}: {word}")
        return acknowledged.retry

    def _task(self, lease: pb.Lease, deadline: float) -> tuple[update_pb2.Task, Packet | None]:
        """The task; where it cannot be read an empty one, and the reply that says so."""
        try:
            return protocol.read_task(self._fetch(lease.task, protocol.MAX_TASK, deadline)), None
        except WireError as error:
            task, why = update_pb2.Task(), f"the task cannot be read: {error}"
            return task, protocol.given_up(task, lease.client, why)

    def _train(
        self, lease: pb.Lease, task: update_pb2.Task, alive: "_Alive", deadline: float
    ) -> Packet:
        """The trainer's reply, or one that says why there is none."""
        policy, past, now = self.policy(lease.policy), self.history(), time.time()
        if soon := policies.with_lease(policy, past, task.run_id, task.round, now):
            return protocol.given_up(task, lease.client, f"policy: {policies.in_words(soon)}")
        try:
            packet = self._assemble(lease, task, deadline)
        except WireError as error:
            return protocol.given_up(task, lease.client, str(error))
        began = time.monotonic()
        try:
            reply = self.trainer.answer(lease.client, packet, self._model(), alive.check)
        except DataError as error:  # names a file, a line, and may quote it: for the owner
            self._tell(str(error))
            return protocol.given_up(task, lease.client, "this device's data cannot be used")
        except CorollaError as error:
            return protocol.given_up(task, lease.client, str(error))
        except OSError as error:  # a full disk
            return protocol.given_up(task, lease.client, f"this device fails: {error.strerror}")
        _log.info("trained", round=task.round, seconds=round(time.monotonic() - began, 3))
        if alive.why:
            return protocol.given_up(task, lease.client, f"given up: {alive.why}")
        if len(reply.payload) > lease.max_upload_bytes:
            return protocol.given_up(task, lease.client, "the update is larger than is taken")
        return reply

    def _assemble(self, lease: pb.Lease, task: update_pb2.Task, deadline: float) -> Packet:
        """The task with what is lacking here of its cached groups."""
        protocol.check_id(task.run_id)  # these become names of files
        wanted = {blob.group: protocol.check_id(blob.content) for blob in lease.cached}
        offered = {blob.sha256 for blob in (lease.payload, *lease.cached)}
        for part in self._state.glob("*.part"):
            if part.stem not in offered:
                part.unlink()
        lacking = set(self.trainer.missing(task.run_id, wanted))
        payload = self._fetch(lease.payload, _LARGEST, deadline)
        groups = [
            self._fetch(blob, _LARGEST, deadline) for blob in lease.cached if blob.group in lacking
        ]
        return protocol.with_groups(task, payload, groups)

    def _deliver(self, lease: pb.Lease, packet: Packet, deadline: float) -> pb.Acknowledgement:
        """Upload and report, until there is an answer or the round is long over."""
        size, at, stuck, sent, most = len(packet.payload), 0, 0, 0, protocol.CHUNK
        while at < size:
            if time.monotonic() > deadline:
                raise _Over("the round is over")
            chunk = protocol.chunk(packet.payload[at : at + most], at, size, lease.id)
            sent += len(chunk.content)
            try:
                status = self._call(self._stub.Upload, chunk, deadline, slow=most > _SMALLEST)
            except _Slow:
                most //= 2
                continue
            if status.problem:
                raise _Over(protocol.one_line(status.problem))
            stuck += status.received <= at
            if status.received > size or stuck > 10 or sent > 3 * size + 8 * protocol.CHUNK:
                raise _Over("the gateway does not take the update in")
            at = status.received
        request = pb.ReportRequest(lease=lease.id, reply=packet.header)
        found: pb.Acknowledgement = self._call(
            self._stub.Report, request, deadline + _LONGEST_PAUSE
        )
        return found

    @contextmanager
    def _alive(self, lease: pb.Lease) -> Any:
        """Keeps the lease meanwhile, in a thread of its own: a step may take long."""
        alive = _Alive(self, lease)
        timer = threading.Thread(target=alive.beat, name="heartbeat", daemon=True)
        timer.start()
        try:
            yield alive
        finally:
            alive.over.set()
            timer.join()

    # --- calls ------------------------------------------------------------------------------------

    def _fetch(self, blob: pb.Blob, most: int, deadline: float) -> bytes:
        return fetch(blob, self._state, lambda r: self._download(r, deadline), most)

    def _download(self, request: pb.DownloadRequest, deadline: float = float("inf")) -> pb.Chunk:
        if self.stop.is_set():  # a base model has many chunks
            raise StoppedError("stopped")
        chunk: pb.Chunk = self._call(self._stub.Download, request, deadline)
        return chunk

    def _call(
        self,
        method: Callable[..., R],
        request: Any,
        deadline: float = float("inf"),
        slow: bool = False,
    ) -> R:
        """The answer to a call, tried again with growing pauses for as long as it makes sense.

        Raises _Over when the gateway or the deadline has ended the session, ConfigError for what
        only the owner can mend; where `slow`, _Slow for a call that took too long.
        """
        pause, longest = self.settings.pauses
        while True:
            try:
                found: Any = method(request, metadata=self._metadata, timeout=_SECONDS)
                self._bytes += request.ByteSize() + found.ByteSize()
                return cast(R, found)
            except grpc.RpcError as error:
                code, details = error.code(), protocol.one_line(error.details() or "")
            if code in _FINAL:
                raise ConfigError(f"the gateway refuses: {details}")
            if "CERTIFICATE_VERIFY_FAILED" in details:
                raise ConfigError(
                    "the gateway's certificate is not signed by --root-certificates, or is of "
                    "another host or time"
                )
            if code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise _Over(details)
            if slow and code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _Slow
            if time.monotonic() + pause > deadline:
                raise _Over(f"no connection before the deadline: {code.name}")
            self._tell(f"no answer, trying again: {code.name}")
            self._wait(pause * (0.5 + self._random.random()))
            pause = min(2 * pause, longest)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise StoppedError("stopped")

    def _tell(self, line: str) -> None:
        if line != self._told:
            self._told = line
            _log.info(line)
            self.say(line)

    def _read(self, name: str) -> str:
        try:
            return protocol.check_id((self._state / name).read_text())
        except (OSError, WireError):
            return ""

    # --- what is asked of this device, and what it has done -------------------------------------

    def policy(self, told: pb.Policy | None = None) -> pb.Policy:
        """The gateway's policy, by default of its last answer, with the owner's limits."""
        known = told
        if known is None:
            try:
                known = protocol.parse(
                    pb.Policy(), (self._state / "policy").read_bytes(), _SMALLEST
                )
            except (OSError, WireError):
                known = pb.Policy()
        return policies.stricter(known, self.settings.limits)

    def history(self) -> list[policies.Entry]:
        """What this device has done in the last 30 days."""
        return policies.read(self._state / "history.jsonl", time.time())

    def _keep(self, policy: pb.Policy) -> None:
        data, scratch = policy.SerializeToString(), self._state / "part-policy"
        if data == self._policy:  # it is asked for at each check-in
            return
        self._policy = data
        scratch.write_bytes(data)
        scratch.replace(self._state / "policy")

    def _note(self, entry: policies.Entry) -> None:
        policies.add(self._state / "history.jsonl", entry)
        self._bytes = 0

    def _clear(self) -> None:
        for path in self._state.glob("reply-*"):
            path.unlink(missing_ok=True)


class _Alive:
    """Whether a task is still worth its work: asked by who trains, between two steps."""

    def __init__(self, phone: Phone, lease: pb.Lease) -> None:
        self._phone, self._policy = phone, phone.policy(lease.policy)
        self._lease, self._history = lease, phone.history()
        self._began, self._charge = time.monotonic(), self._battery()
        self._due = 0.0
        self.over = threading.Event()
        self.why = ""

    def check(self) -> bool:
        """False once the task is to be given up."""
        now = time.monotonic()
        if not self.why and now >= self._due:
            self._due = now + _EVERY
            self.why = self._lapsed()
        return not self.why

    def beat(self) -> None:
        """Renew the lease, three times in its time."""
        pause = max(0.1, self._lease.seconds / 3)
        while not self.over.wait(pause) and not self.why:
            request = pb.HeartbeatRequest(lease=self._lease.id)
            try:
                found = self._phone._stub.Heartbeat(
                    request, metadata=self._phone._metadata, timeout=pause
                )
            except grpc.RpcError:
                continue  # the lease outlives two of these
            if not found.wanted:
                self.why = "not wanted any more"

    def _lapsed(self) -> str:
        """What of the policy does not hold any more."""
        if self._phone.stop.is_set():
            return "the device was stopped"
        lacks = policies.while_training(
            self._policy,
            self._phone.settings.conditions(),
            self._history,
            time.time(),
            *self.spent(),
        )
        first = policies.in_words(lacks[:1])
        return first + " any more" * first.startswith("not ")

    def spent(self) -> tuple[float, float]:
        """(seconds, percent of a full charge) since the lease began; a charger gives nothing."""
        return time.monotonic() - self._began, max(0.0, self._charge - self._battery())

    def _battery(self) -> float:
        return float(self._phone.settings.conditions().get("battery_percent", 0))


def _write_packet(path: Path, packet: Packet) -> None:
    scratch = path.with_name("part-" + path.name)
    message = pb.Packet(header=packet.header, payload=packet.payload)
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(message.SerializeToString())
    scratch.replace(path)


def _read_packet(path: Path) -> Packet | None:
    try:
        found = protocol.parse(pb.Packet(), path.read_bytes(), _LARGEST)
    except (OSError, WireError):
        return None
    return Packet(found.header, found.payload)
