"""A gateway: to a server a trainer with seats, to phones the server of proto/device.proto.

A task is offered to phones that check in; their replies are judged as they come, merged when there
are enough or the deadline is near, and go up as one. Nothing of a round outlives it but cached
groups and the log, on disk: a gateway that is killed loses its round, not its phones.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from corolla.errors import CorollaError, WireError
from corolla.host import logs
from corolla.server.gateway.blobs import Blobs, manifest
from corolla.server.gateway.check_in import CheckIns
from corolla.server.gateway.deliveries import Deliveries
from corolla.server.gateway.job import Job, Rounds
from corolla.server.gateway.leases import OfferRound, Phase
from corolla.server.gateway.merging import prepare
from corolla.server.gateway.natives import Natives
from corolla.server.gateway.outbound import RunStore
from corolla.server.gateway.programs import Programs
from corolla.server.gateway.roster import Roster
from corolla.server.gateway.settings import GatewaySettings
from corolla.wire.messages import Kind, Reply, Task, pack_reply, unpack_task
from corolla.wire.packet import Packet
from corolla.wire.rpc import FOREVER, Waits

_log = logs.logger("gateway")


class Gateway:
    """Answers the server's packets with what its phones make of them. Thread-safe.

    Phones call `check_ins` for work, `blobs` for what it is made of, `deliveries` with replies.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        clock: Callable[[], float] = time.monotonic,
        known: Callable[[str], bool] = lambda owner: True,
        names: Callable[[str], bool] = lambda device: False,
    ) -> None:
        """`known`: whether an owner's token still counts; `names`: whether a device has its own.

        Raises ConfigError when the model or the bundle to be shared is none.
        """
        self.settings, self.clock = settings, clock
        state, model, bundle = settings.state, settings.share_model, settings.share_bundle
        self.rounds, self.roster = Rounds(), Roster(settings.retry, known, names)
        self.deliveries = Deliveries(settings, self.rounds, self.roster, clock)
        self.blobs = Blobs(state / "blobs")
        offered = self.blobs.share_all(*manifest(model), state / "manifest") if model else None
        programs = Programs(bundle, settings.publisher, self.blobs, state) if bundle else None
        self._natives = Natives(programs, self.blobs)
        self.check_ins = CheckIns(settings, self.rounds, self.roster, self._natives, offered, clock)
        self._store = RunStore(state / "runs", self.blobs)
        self._last: tuple[str, Packet] | None = None  # digest of a task → its reply
        self._starting = threading.Lock()
        self._since = clock()
        self.say: Callable[[str], None] = lambda line: None
        """Told what the gateway's owner can do something about."""

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
                if task.refusal:
                    self.say(f"the server refuses this gateway: {task.refusal}")
                    raise WireError("refused")
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
            time.sleep(max(0.0, 1.5 * settings.retry - (self.clock() - self._since)))
        with self.rounds.changed:
            present = self.roster.present(self.clock())
        if not present and not settings.seats:
            raise WireError("no eligible phone has checked in yet")
        # A member without examples would be left out; what the number is does not count.
        return replace(blank, seats=settings.seats or present, num_examples=max(1, present))

    def _train(self, task: Task, digest: str, blank: Reply, left: float) -> Packet:
        with self._starting:  # one at a time; phones are served meanwhile
            with self.rounds.changed:
                if self._last and self._last[0] == digest:
                    return self._last[1]
                job = self.rounds.job
            if job is None or job.digest != digest:
                started = self._start(task, digest, left)
                if isinstance(started, list):
                    names = ", ".join(started)
                    return pack_reply(replace(blank, missing=started, error=f"{names}: not held"))
                job = started
        return self._awaited(job) or self._concluded(job, blank)

    def _start(self, task: Task, digest: str, left: float) -> Job | list[str]:
        """Offer a task to phones. Raises WireError or ConfigError for one that cannot be done."""
        if not task.seats:
            raise WireError(f"{self.settings.name} is a gateway and is asked as a client")
        merging = prepare(task, self.settings.allow)
        self.rounds.replace()
        with self.rounds.changed:
            self._last = None
        parcel = self._store.take_in(task)
        if isinstance(parcel, list):
            return parcel
        demand, first = self._natives.begin(merging, task)
        parcel = replace(parcel, first=first)
        self.blobs.keep(parcel.names)
        now, seconds = self.clock(), max(0.0, min(merging.config.deadline, left))
        round = OfferRound(
            task.seats,
            now + seconds - margin(seconds),
            self.settings.lease,
            self.settings.over_select,
        )
        job = Job(digest, parcel, merging, round, demand)
        self.rounds.begin(job)
        _log.info("round offered", seats=task.seats, seconds=round.deadline - now)
        return job

    def _awaited(self, job: Job) -> Packet | None:
        """The reply to a task, once another call has made it; None once this one is to make it.

        Raises WireError when another task has come meanwhile.
        """
        with self.rounds.changed:
            while not (job.replaced or job.reply):
                now = self.clock()
                if job.round.over(now) and not job.merging_now:
                    break
                self.rounds.changed.wait(min(1.0, max(0.01, job.round.deadline - now)))
            if job.reply:
                return job.reply
            if job.replaced:
                raise WireError("another task has taken this one's place")
            self.rounds.end(job)
            return None

    def _concluded(self, job: Job, blank: Reply) -> Packet:
        """The reply to a task whose round is over, for all calls that wait for it."""
        reply = pack_reply(replace(blank, error="the gateway failed to merge"))
        try:
            reply = self._merged(job)
        except (CorollaError, OSError, ValueError) as error:
            reply = pack_reply(replace(blank, error=str(error)))
        finally:
            with self.rounds.changed:
                job.reply = reply
                self.rounds.changed.notify_all()
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
        with self.rounds.changed:
            self._last = (job.digest, reply)
        return reply


def margin(seconds: float) -> float:
    """Of a round's deadline, what is left for the reply's way up."""
    return min(seconds / 3, 15.0)
