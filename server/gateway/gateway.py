"""A gateway: to a server a trainer with seats, to phones the server of proto/device.proto.

A task is offered to phones that check in; their replies are judged as they come, merged when there
are enough or the deadline is near, and go up as one. Nothing of a round outlives it but cached
groups and the log, on disk: a gateway that is killed loses its round, not its phones.
"""

import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from corolla.errors import CorollaError, WireError
from corolla.host import logs
from corolla.phones import protocol
from corolla.phones.protocol import window
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import leases
from corolla.server.gateway.access import Token
from corolla.server.gateway.blobs import Blobs, manifest
from corolla.server.gateway.budget import Assignment
from corolla.server.gateway.job import Job
from corolla.server.gateway.leases import Lease, Phase, Policy, Round, Seen
from corolla.server.gateway.merging import prepare
from corolla.server.gateway.natives import Denied, Natives
from corolla.server.gateway.offer import Offer, run_as, to_message
from corolla.server.gateway.outbound import take_in
from corolla.server.rounds.verdicts import Code
from corolla.storage.memory import Memory
from corolla.wire import limits, messages
from corolla.wire.messages import Kind, Reply, Task, pack_reply, unpack_task
from corolla.wire.packet import Packet
from corolla.wire.rpc import FOREVER, Waits

_CHECK_INS = 200
"""A second, at most: with more phones than that they are asked to stay away for longer."""
_FORGET = 86_400.0
"""Seconds after which a phone that does not come any more is forgotten."""
_MOST_PHONES = 1 << 16
_LATER = 10.0
"""How many times as long a phone stays away whose reply was of no use."""
_ENDS = {Code.ACCEPTED: Phase.VALID, Code.MISSING: Phase.LOST, Code.CLIENT_ERROR: Phase.GIVEN_UP}

_log = logs.logger("gateway")


@dataclass(frozen=True)
class Settings:
    """What the owner of a gateway decides. `seats` 0: as many as eligible phones were seen."""

    name: str
    state: Path
    policy: Policy = field(default_factory=Policy)
    over_select: float = 1.3
    seats: int = 0
    retry: float = 10.0
    """Seconds between two check-ins of a phone, on average."""
    lease: float = 60.0
    """Seconds that a phone may be silent."""
    share_model: Path | None = None
    share_bundle: Path | None = None
    publisher: Path | None = None
    """The public key that the bundle must be signed with; None: phones alone look at that."""
    allow: Sequence[str] = ()


class Gateway:
    """Answers the server's packets with what its phones make of them. Thread-safe."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        known: Callable[[str], bool] = lambda owner: True,
    ) -> None:
        """`known`: whether an owner's token still counts.

        Raises ConfigError when the model or the bundle to be shared is none.
        """
        self.settings, self._clock, self._known = settings, clock, known
        self._spool = settings.state / "spool"
        self._spool.mkdir(parents=True, exist_ok=True)
        self._blobs = Blobs(settings.state / "blobs")
        self._model: pb.Blob | None = None
        if settings.share_model:
            data, files = manifest(settings.share_model)
            path = settings.state / "manifest"
            path.write_bytes(data)
            for name, file in files.items():
                self._blobs.share(name, file, file.stat().st_size)
            self._model = pb.Blob(sha256=protocol.sha256(data), size=len(data))
            self._blobs.share(self._model.sha256, path, len(data))
        bundle = settings.share_bundle
        self._natives = Natives(
            Offer(bundle, settings.publisher, self._blobs, settings.state) if bundle else None,
            self._blobs,
        )
        self._policy = pb.Policy(**vars(settings.policy))
        self._changed = threading.Condition()  # its lock guards all that follows
        self._seen: dict[str, Seen] = {}
        self._job: Job | None = None
        self._last: tuple[str, Packet] | None = None
        self._before: Round | None = None
        self._cached: Sequence[pb.Blob] = ()
        self._memory: tuple[str, Memory] | None = None
        self._starting = threading.Lock()
        self._judging = threading.Lock()
        self._since = clock()

    # --- to the server ----------------------------------------------------------------------------

    def answer(self, packet: Packet, waits: Waits = FOREVER) -> Packet:
        """The reply to a server's task: blocks until phones have done it or time is over.

        Asked again with the same task it joins the one in progress, or repeats its reply. Raises
        WireError when the packet is no task.
        """
        task = unpack_task(packet)
        blank = Reply(task.run_id, task.round, task.base_version, task.kind, self.settings.name)
        with logs.bind(run=task.run_id, round=task.round):
            try:
                if task.kind == Kind.TRAIN:
                    digest = hashlib.sha256(packet.header).hexdigest()
                    return self._train(task, digest, blank, waits.left())
                if task.kind == Kind.HELLO:
                    return pack_reply(self._hello(blank))
                raise WireError("a gateway has no examples of its own to evaluate on")
            except CorollaError as error:
                why = str(error)
            except OSError as error:  # a full disk
                why = f"the gateway's disk fails: {error.strerror}"
            _log.warning("failed", error=why)
            return pack_reply(replace(blank, error=why))

    def _hello(self, blank: Reply) -> Reply:
        settings = self.settings
        if not settings.seats:  # every phone has had a chance to come
            time.sleep(max(0.0, 1.5 * settings.retry - (self._clock() - self._since)))
        with self._changed:
            present = leases.seats(self._seen, self._clock(), 3 * self._pause())
        if not present and not settings.seats:
            raise WireError("no eligible phone has checked in yet")
        seats = settings.seats or len(present)
        # A member without examples would be left out; what the number is does not count.
        return replace(blank, seats=seats, num_examples=max(1, len(present)))

    def _train(self, task: Task, digest: str, blank: Reply, left: float) -> Packet:
        with self._starting:  # one at a time; phones are served meanwhile
            with self._changed:
                if self._last and self._last[0] == digest:
                    return self._last[1]
                job = self._job if self._job and self._job.digest == digest else None
            if job is None:
                started = self._start(task, digest, left)
                if isinstance(started, list):
                    names = ", ".join(started)
                    return pack_reply(replace(blank, missing=started, error=f"{names}: not held"))
                job = started
        with self._changed:
            while not (job.replaced or job.reply):
                now = self._clock()
                if job.round.over(now) and not job.merging_now:
                    break
                self._changed.wait(min(1.0, max(0.01, job.round.deadline - now)))
            if job.reply:
                return job.reply
            if job.replaced:
                raise WireError("another task has taken this one's place")
            job.merging_now = True  # from here on nothing is taken in
            self._job, self._before = None, job.round
        reply = pack_reply(replace(blank, error="the gateway failed to merge"))
        try:
            reply = self._merged(job)
        except (CorollaError, OSError, ValueError) as error:
            reply = pack_reply(replace(blank, error=str(error)))
        finally:
            with self._changed:
                job.reply = reply
                self._changed.notify_all()
            job.close()
        return reply

    def _merged(self, job: Job) -> Packet:
        """The valid replies of a round that is over as one. Raises WireError when there is none."""
        of_phases = {str(phase): job.round.count(phase) for phase in Phase}
        counted = {name: n for name, n in {**of_phases, **job.budgets()}.items() if n}
        _log.info("round over", seats=job.round.seats, **counted)
        if not job.round.count(Phase.VALID):
            raise WireError(f"none of {len(job.round.leases)} phones gave a valid update in time")
        reply = job.merging.merge(self.settings.name, job.replies(self.settings.name))
        with self._changed:
            self._last = (job.digest, reply)
        return reply

    def _start(self, task: Task, digest: str, left: float) -> Job | list[str]:
        """Offer a task to phones. Raises WireError or ConfigError for one that cannot be done."""
        if not task.seats:
            raise WireError(f"{self.settings.name} is a gateway and is asked as a client")
        merging = prepare(task, self.settings.allow)
        with self._changed:
            old = self._job
            if old:  # its server does not wait for it any more
                old.replaced, self._job = True, None
            self._last = None
            self._changed.notify_all()
        if old:
            old.close()
        parcel = take_in(task, self._memory_of(task.run_id), self._blobs, self._cached)
        if isinstance(parcel, list):
            return parcel
        self._cached = parcel.cached
        demand, first = self._natives.begin(merging, task)
        parcel = replace(parcel, first=first)
        self._blobs.keep(parcel.names)
        now, seconds = self._clock(), max(0.0, min(merging.config.deadline, left))
        round = Round(
            task.seats,
            now + seconds - margin(seconds),
            self.settings.lease,
            self.settings.over_select,
        )
        job = Job(digest, parcel, merging, round, demand)
        with self._changed:
            self._job = job
        _log.info("round offered", seats=task.seats, seconds=round.deadline - now)
        return job

    def _memory_of(self, run_id: str) -> Memory:
        """What is held of a run; that of other runs is deleted."""
        runs = self.settings.state / "runs"
        if self._memory is None or self._memory[0] != run_id:
            for old in runs.glob("*"):
                if old.name != run_id:
                    shutil.rmtree(old, ignore_errors=True)
            self._memory = (run_id, Memory(runs / run_id))
        return self._memory[1]

    def _client(self, device: str) -> str:
        return f"{self.settings.name}/{device}"

    # --- to phones --------------------------------------------------------------------------------

    def check_in(self, request: pb.CheckInRequest, token: Token) -> pb.CheckInResponse:
        """A lease, or why there is none and when to come back."""
        now, settings = self._clock(), self.settings
        refuse, reason = self._refusal, pb.Refusal
        if request.protocol != protocol.PROTOCOL:
            text = f"this gateway speaks version {protocol.PROTOCOL}, not {request.protocol}"
            return refuse(reason.REASON_PROTOCOL, text)
        try:
            device = protocol.check_device(request.device)
        except WireError as error:
            return refuse(reason.REASON_NAME, str(error))
        if token.device not in ("", device):
            return refuse(reason.REASON_NAME, f"this token is of device {token.device!r}")
        able = messages.load_capabilities(request.capabilities)
        lacks = settings.policy.lacks(able)
        examples, least = min(request.num_examples, limits.MAX_EXAMPLES), settings.policy.examples
        enough = examples >= max(1, least)
        with self._changed:
            known = self._seen.get(device)
            if known and self._keeps(known, token, now):
                return refuse(reason.REASON_NAME, f"another device is called {device!r}")
            job, native = self._job, request.HasField("native")
            assigned = self._natives.assign(request, device, job, now) if native else None
            eligible = not lacks and enough and not isinstance(assigned, Denied)
            self._see(device, Seen(token.owner, examples, now, eligible))
        if lacks:
            return refuse(reason.REASON_NOT_ELIGIBLE, f"it is not {lacks}")
        if not enough:
            text = f"it has {examples or 'no'} examples" + f", not {least}" * (examples > 0)
            return refuse(reason.REASON_NOT_ELIGIBLE, text)
        if isinstance(assigned, Denied):
            return self._refused(assigned)
        if lacking := self._lacks(request, assigned):
            return self._refused(lacking)
        with self._changed:
            if job is None or self._job is not job:  # what is assigned is of one round alone
                return refuse(reason.REASON_NO_TASK, "no round")
            round, lease = job.round.check_in(
                device, token.owner, examples, secrets.token_hex(16), now, assigned
            )
            if isinstance(lease, str):
                job.round = round
                told = None
            else:
                try:
                    told = self._lease(job, round, lease, request, now)
                except ValueError as error:
                    return refuse(reason.REASON_NO_TASK, f"the task cannot be told: {error}")
                job.round = round
            job.drop_lost()
        if isinstance(lease, str):
            return refuse(reason.REASON_NO_TASK, lease)
        _log.info("lease", client=self._client(device), **run_as(lease.assigned))
        return pb.CheckInResponse(lease=told, retry=self._retry(), policy=self._policy)

    def _lacks(self, request: pb.CheckInRequest, assigned: Assignment | None) -> Denied | None:
        """That a phone has not the files that it would train with."""
        if assigned:
            return self._natives.lacks(assigned, request.manifest)
        if request.own_model or (self._model and request.manifest == self._model.sha256):
            return None
        text = "get the base model" if self._model else "this gateway offers no base model"
        return Denied(pb.Refusal.REASON_MODEL, text, self._model)

    def _keeps(self, holder: Seen, token: Token, now: float) -> bool:
        """Whether a name stays with who has it: not against a token that is of this very name."""
        if token.device or holder.owner == token.owner:
            return False
        return now - holder.at < _FORGET and self._known(holder.owner)

    def _lease(
        self, job: Job, round: Round, lease: Lease, request: pb.CheckInRequest, now: float
    ) -> pb.Lease:
        header, cached = job.told(lease, request.log_version)
        return pb.Lease(
            id=lease.id,
            client=self._client(lease.device),
            task=header,
            payload=job.parcel.payload,
            cached=cached,
            strategy=Path(job.merging.config.strategy).name,
            phase="train",
            policy=self._policy,
            seconds=lease.ends - now,
            deadline_seconds=round.deadline - now,
            max_upload_bytes=job.most_bytes(lease),
            assignment=to_message(lease.assigned),
        )

    def download(self, request: pb.DownloadRequest) -> pb.Chunk:
        """A piece of what was announced. Raises KeyError when that is not offered any more."""
        return self._blobs.chunk(request.sha256, request.offset)

    def upload(self, chunk: pb.Chunk, token: Token) -> pb.UploadStatus:
        """Take a piece of a reply's payload in; a problem ends the session."""
        now = self._clock()
        with self._changed:
            job = self._job
            if job is None:
                return pb.UploadStatus(problem="the round is over")
            lease = self._own(job, chunk.lease, token)
            why = job.round.refuses(chunk.lease, now)
            if why or lease is None:
                return pb.UploadStatus(problem=why)
            job.round, _ = job.round.heartbeat(chunk.lease, now)
            upload = job.upload(lease, self._spool)
        try:
            return pb.UploadStatus(received=upload.add(chunk))
        except WireError as error:
            return pb.UploadStatus(received=upload.received, problem=str(error))
        except ValueError:  # closed: the round has ended meanwhile
            return pb.UploadStatus(problem="the round is over")

    def report(self, request: pb.ReportRequest, token: Token) -> pb.Acknowledgement:
        """The verdict on a reply; the same for the same lease, as often as it is asked."""
        now = self._clock()
        with self._judging:
            with self._changed:
                job = self._job
                before = self._before.leases.get(request.lease) if self._before else None
                if before:
                    self._check(before, token)
                    valid = before.phase == Phase.VALID
                    return self._acknowledge("" if valid else before.why or "the round is over")
                if job is None:
                    return self._acknowledge("the round is over")
                lease = self._own(job, request.lease, token)
                if lease and lease.phase == Phase.VALID:
                    return self._acknowledge("")
                job.round, why = job.round.report(request.lease, now)
                if why or lease is None:
                    return self._acknowledge(why)
            verdict = job.judge(lease, self._client(lease.device), request.reply)
            with self._changed:
                phase, why = _ENDS.get(verdict.code, Phase.REFUSED), verdict.why
                if self._job is not job:
                    phase, why = Phase.LATE, "the round is over"
                job.round = job.round.settle(lease.id, phase, why)
                settled = job.round.leases[lease.id]
                if settled.phase == Phase.VALID:
                    job.headers[lease.id] = request.reply
                elif upload := job.uploads.pop(lease.id, None):
                    upload.close()
                self._changed.notify_all()
        told = None if verdict.accepted else verdict.why
        _log.info("reply", client=self._client(lease.device), verdict=verdict.code, why=told)
        return self._acknowledge(settled.why, _LATER if settled.phase == Phase.REFUSED else 1.0)

    def heartbeat(self, request: pb.HeartbeatRequest, token: Token) -> pb.HeartbeatResponse:
        """Keep a lease while its result can still count."""
        with self._changed:
            job = self._job
            if job is None:
                return pb.HeartbeatResponse()
            self._own(job, request.lease, token)
            job.round, seconds = job.round.heartbeat(request.lease, self._clock())
        return pb.HeartbeatResponse(wanted=seconds > 0, seconds=seconds)

    def _own(self, job: Job, id: str, token: Token) -> Lease | None:
        """A lease, if this token may speak for it. Raises PermissionError."""
        lease = job.round.leases.get(id)
        if lease:
            self._check(lease, token)
        return lease

    @staticmethod
    def _check(lease: Lease, token: Token) -> None:
        if lease.owner != token.owner:
            raise PermissionError("the lease is of another device")

    def _see(self, device: str, seen: Seen) -> None:
        self._seen.pop(device, None)
        self._seen[device] = seen  # the last one came last
        oldest = next(iter(self._seen))
        if len(self._seen) > _MOST_PHONES or seen.at - self._seen[oldest].at > _FORGET:
            del self._seen[oldest]

    def _pause(self) -> float:
        return max(self.settings.retry, len(self._seen) / _CHECK_INS)

    def _retry(self, times: float = 1.0) -> pb.RetryWindow:
        pause = times * self._pause()
        return window(pause / 2, 3 * pause / 2)

    def _refusal(self, reason: "pb.Refusal.Reason", text: str) -> pb.CheckInResponse:
        return self._refused(Denied(reason, text))

    def _refused(self, denied: Denied) -> pb.CheckInResponse:
        refusal, retry = denied.message(), self._retry()
        return pb.CheckInResponse(refusal=refusal, retry=retry, policy=self._policy)

    def _acknowledge(self, why: str, times: float = 1.0) -> pb.Acknowledgement:
        return pb.Acknowledgement(accepted=not why, why=why, retry=self._retry(times))


def margin(seconds: float) -> float:
    """Of a round's deadline, what is left for the reply's way up."""
    return min(seconds / 3, 15.0)
