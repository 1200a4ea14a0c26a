"""A phone's half of proto/device.proto: it dials in, trains when asked, reports, comes back.

Needs grpc, protobuf and numpy; what trains is behind PhoneTrainer (lease.py). It survives whatever
ends a call: a network that is cut, a gateway that starts again, its own death (a reply that was not
yet delivered waits on the disk).
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from corolla.client.phone import policies
from corolla.client.phone.alive import Alive
from corolla.client.phone.channel import Caller
from corolla.client.phone.clock import Clock
from corolla.client.phone.delivery import deliver, settle
from corolla.client.phone.downloads import fetch_model, verified
from corolla.client.phone.kept import Kept
from corolla.client.phone.lease import PhoneTrainer, Work
from corolla.client.phone.meter import SessionOverError, UsedUpError
from corolla.client.phone.policies import NO_LIMITS, Limits
from corolla.errors import ConfigError, DiskLimitError, PeerError, WireError
from corolla.host import logs
from corolla.host.text import one_line
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.storage.disk import USUAL, DiskLimits

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds after a call that failed."""
_LOOK = 30.0
"""Seconds between two looks at the device's conditions, at most, until a gateway says when."""
_VISITS = 1 << 16
"""Bytes of visits without a lease that make an entry of the history: it is written whole."""
_PATIENCE = 20.0
"""Seconds for which a call of a single check-in is tried again."""
_CAPABILITIES = frozenset(update_pb2.Capabilities.DESCRIPTOR.fields_by_name)

_log = logs.logger("phone")


@dataclass(frozen=True)
class Settings:
    """The settings that a phone's owner decides."""

    device: str
    token: str
    state: Path
    own_model: bool = True
    conditions: Callable[[], Mapping[str, Any]] = lambda: {"charging": True, "idle": True}
    """Fields of the message Capabilities, asked for anew each time."""
    pauses: tuple[float, float] = (_FIRST_PAUSE, _LONGEST_PAUSE)
    """Seconds after a call that failed: the first, and the longest."""
    limits: Limits = NO_LIMITS
    disk: DiskLimits = USUAL


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
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        settings = self.settings
        protocol.check_device(settings.device)
        self.kept = Kept(settings.state, settings.limits, settings.disk)
        self.caller = Caller(
            self.channel, settings.token, settings.pauses, self.stop, self._tell, self.clock
        )
        self._told = ""
        self._window = protocol.window(_LOOK / 2, _LOOK)
        self._whole: Path | None = None  # the base model that this process has checked

    def run(self, rounds: int = 0, once: bool = False) -> None:
        """Serve until `rounds` updates were accepted (0: for ever), or for one check-in.

        Raises ConfigError for what only the owner can mend, StoppedError when `stop` is set,
        PeerError when the gateway of the one check-in does not answer.
        """
        try:
            if once:
                self._visit_once()
                return
            while not (rounds and self.done >= rounds):
                try:
                    pause = self.visit()
                except SessionOverError as over:
                    self._tell(f"the gateway refuses: {over}")
                    pause = self.settings.pauses[1]
                if not (rounds and self.done >= rounds):
                    self.caller.wait(pause)
        finally:
            if self.caller.meter.spent().bytes:
                with suppress(OSError):  # a full disk
                    self._note(policies.Entry(self.clock.date(), "", 0))

    def _visit_once(self) -> None:
        self.caller.patience = _PATIENCE
        try:
            self.visit()
        except SessionOverError as over:
            raise PeerError(f"the gateway does not answer: {over}") from over

    def visit(self) -> float:
        """Check in once and do what there is; the seconds until the next time."""
        try:
            return self._visit()
        except UsedUpError as over:  # or as good as: the next visit would come no further
            self._tell(f"waiting: {over}")
            return self.settings.pauses[1]
        except OSError as error:  # a full disk: its owner may make room
            self._tell(f"this device fails: {error.strerror}")
            return self.settings.pauses[1]

    def _visit(self) -> float:
        device, examples = self.settings.conditions(), self.trainer.examples()
        policy, now = self.kept.policy(), self.clock.date()
        history, meter = self.kept.history(now), self.caller.meter
        meter.limit(policy, history, now)
        lacks = policies.before_check_in(policy, device, examples, history, now, meter.spent())
        if lacks:
            self._tell(f"waiting: {policies.in_words(lacks)}")
            return self.caller.pause(self._window)
        found = self._check_in(device, examples)
        self._window = found.retry
        self.kept.keep_policy(found.policy)
        if found.WhichOneof("answer") == "lease":
            return self.caller.pause(self._leased(found))
        return self._refused(found)

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
            log_version=self.kept.log_version(),
        )
        found: pb.CheckInResponse = self.caller.call(self.caller.stub.CheckIn, request)
        return found

    def _refused(self, found: pb.CheckInResponse) -> float:
        """Handles a gateway's refusal of a lease; returns the seconds until the next check-in."""
        refusal = found.refusal
        if refusal.reason == pb.Refusal.REASON_PROTOCOL:
            raise ConfigError(f"the gateway refuses: {one_line(refusal.text, protocol.MAX_TEXT)}")
        if refusal.reason == pb.Refusal.REASON_MODEL:
            return self._get_model(refusal)
        self._tell(f"waiting: {one_line(refusal.text, protocol.MAX_TEXT)}")
        if self.caller.meter.spent().bytes >= _VISITS:
            self._note(policies.Entry(self.clock.date(), "", 0))
        if refusal.reason == pb.Refusal.REASON_NAME:  # until its holder is forgotten
            return self.settings.pauses[1]
        return self.caller.pause(found.retry)

    # --- the base model ---------------------------------------------------------------------------

    def _get_model(self, refusal: pb.Refusal) -> float:
        if self.settings.own_model or not refusal.base_model.size:
            raise ConfigError(f"{one_line(refusal.text, protocol.MAX_TEXT)}: name one with --model")
        try:
            folder = fetch_model(
                refusal.base_model, self.kept.models, self.caller.download, self.settings.disk
            )
        except UsedUpError:
            raise
        except SessionOverError as over:
            self._tell(f"the base model is not fetched: {over}")
            return self.caller.least_pause
        except (WireError, DiskLimitError) as error:
            self._tell(f"the gateway's base model is refused: {error}")
            return self.settings.pauses[1]
        finally:
            self._note(policies.Entry(self.clock.date(), "", 0))
        self._tell(f"base model {folder.name[:12]} is here")
        self.kept.keep_model(folder)
        self._whole = folder
        return self.caller.least_pause

    def _model(self) -> Path | None:
        """The gateway's base model, if it is here and whole; None: an own one, or none yet."""
        if self._whole is None and not self.settings.own_model:
            folder = self.kept.model()
            self._whole = folder if folder and verified(folder) else None
        return self._whole

    # --- a session --------------------------------------------------------------------------------

    def _leased(self, found: pb.CheckInResponse) -> pb.RetryWindow:
        """Serves a lease, and says why when nothing comes of it; the gateway's last window."""
        with logs.bind(client=found.lease.client):
            try:
                return self._serve(found.lease)
            except UsedUpError:
                raise
            except SessionOverError as over:
                self._tell(f"dropped: {over}")
            except WireError as error:
                self._tell(f"the gateway sends what cannot be read: {error}")
        return found.retry

    def _serve(self, lease: pb.Lease) -> pb.RetryWindow:
        """Fetch, train, deliver."""
        work = self._work(lease)
        task, accepted = update_pb2.Task(), False
        with self._alive(lease) as alive:
            try:
                task, unread = work.task()
                packet = unread or self.kept.reply(lease.id)
                if packet is None:
                    packet = work.train(task, alive)
                    self.kept.keep_reply(lease.id, packet)
                answer = deliver(self.caller, lease.id, packet, work.deadline)
                accepted = answer.accepted
                self.kept.drop_replies()
            except SessionOverError as over:
                self.kept.drop_replies()
                if isinstance(over, UsedUpError):
                    self._give_up(lease, task, over)
                raise
            finally:
                entry = policies.Entry(
                    at=self.clock.date(), run=task.run_id, round=task.round, accepted=accepted
                )
                self._note(entry, alive.spent().battery)
        self.done += answer.accepted
        word = settle(self.kept, task, packet, answer)
        self._tell(f"round {task.round} as {one_line(lease.client, protocol.MAX_TEXT)}: {word}")
        return answer.retry

    def _give_up(self, lease: pb.Lease, task: update_pb2.Task, why: UsedUpError) -> None:
        """Tell the gateway that it need not wait."""
        header = protocol.given_up(task, lease.client, f"given up: {why}").header
        request = pb.ReportRequest(lease=lease.id, reply=header)
        with suppress(SessionOverError):
            self.caller.last_word(self.caller.stub.Report, request)

    def _work(self, lease: pb.Lease) -> Work:
        """Returns the Work of a lease. Raises WireError when the lease is not this device's."""
        protocol.check_id(lease.id)  # it becomes the name of a file
        if not lease.client.endswith(f"/{self.settings.device}"):
            raise WireError("the lease is of another device")
        deadline = self.clock.now() + max(0.0, lease.deadline_seconds)
        return Work(lease, deadline, self.caller, self.kept, self.trainer, self._model())

    def _alive(self, lease: pb.Lease) -> Alive:
        now = self.clock.date()
        policy, history = self.kept.policy(lease.policy), self.kept.history(now)
        self.caller.meter.limit(policy, history, now)
        self.caller.meter.works()
        return Alive(self.caller, lease, policy, self.settings.conditions, history)

    def _note(self, entry: policies.Entry, battery: float = 0.0) -> None:
        """Add an entry to the history, with what the meter has counted since the last one."""
        spent = asdict(self.caller.meter.spent(battery))
        self.kept.note(replace(entry, **spent))
        self.caller.meter.settle()

    def _tell(self, line: str) -> None:
        if line != self._told:
            self._told = line
            _log.info(line)
            self.say(line)
