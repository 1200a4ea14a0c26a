"""Messages of phones under their leases: signs of life, pieces of a reply, and the reply itself."""

import threading
from collections.abc import Callable

from corolla.errors import WireError
from corolla.host import logs
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.access import Token
from corolla.server.gateway.job import Job, Rounds
from corolla.server.gateway.leases import Lease, Phase
from corolla.server.gateway.roster import Roster
from corolla.server.gateway.settings import GatewaySettings
from corolla.server.rounds.verdicts import Code

_LATER = 10.0
"""Factor on the pause of a phone whose reply was of no use."""
_ENDS = {Code.ACCEPTED: Phase.VALID, Code.MISSING: Phase.LOST, Code.CLIENT_ERROR: Phase.GIVEN_UP}

_log = logs.logger("gateway")


class Deliveries:
    """Takes in what phones with a lease send. Thread-safe.

    Every call raises PermissionError for a lease that is another owner's.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        rounds: Rounds,
        roster: Roster,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._clock = settings, clock
        self._rounds, self._roster = rounds, roster
        self._spool = settings.state / "spool"
        self._spool.mkdir(parents=True, exist_ok=True)
        self._judging = threading.Lock()

    def heartbeat(self, request: pb.HeartbeatRequest, token: Token) -> pb.HeartbeatResponse:
        """Keep a lease while its result can still count."""
        with self._rounds.changed:
            job = self._rounds.job
            if job is None:
                return pb.HeartbeatResponse()
            _own(job, request.lease, token)
            job.round, seconds = job.round.heartbeat(request.lease, self._clock())
        return pb.HeartbeatResponse(wanted=seconds > 0, seconds=seconds)

    def upload(self, chunk: pb.Chunk, token: Token) -> pb.UploadStatus:
        """Take a piece of a reply's payload in; a problem ends the session."""
        now = self._clock()
        with self._rounds.changed:
            job = self._rounds.job
            if job is None:
                return pb.UploadStatus(problem="the round is over")
            lease = _own(job, chunk.lease, token)
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
            with self._rounds.changed:
                job, before = self._rounds.job, self._rounds.before
                past = before.leases.get(request.lease) if before else None
                if past:
                    _check(past, token)
                    valid = past.phase == Phase.VALID
                    return self._acknowledge(
                        token, "" if valid else past.why or "the round is over"
                    )
                if job is None:
                    return self._acknowledge(token, "the round is over")
                lease = _own(job, request.lease, token)
                if lease and lease.phase == Phase.VALID:
                    return self._acknowledge(token, "")
                job.round, why = job.round.report(request.lease, now)
                if why or lease is None:
                    return self._acknowledge(token, why)
            settled = self._settle(job, lease, request.reply)
        times = _LATER if settled.phase == Phase.REFUSED else 1.0
        return self._acknowledge(token, settled.why, times)

    def _settle(self, job: Job, lease: Lease, header: bytes) -> Lease:
        """A lease as it stands once its reply has been judged."""
        client = self._settings.client(lease.device)
        verdict = job.judge(lease, client, header)
        with self._rounds.changed:
            phase, why = _ENDS.get(verdict.code, Phase.REFUSED), verdict.why
            if self._rounds.job is not job:
                phase, why = Phase.LATE, "the round is over"
            job.round = job.round.settle(lease.id, phase, why)
            settled = job.round.leases[lease.id]
            if settled.phase == Phase.VALID:
                job.headers[lease.id] = header
            elif upload := job.uploads.pop(lease.id, None):
                upload.close()
            self._rounds.changed.notify_all()
        told = None if verdict.accepted else verdict.why
        _log.info("reply", client=client, verdict=verdict.code, why=told)
        return settled

    def _acknowledge(self, token: Token, why: str, times: float = 1.0) -> pb.Acknowledgement:
        retry = self._roster.retry(token.owner, times)
        return pb.Acknowledgement(accepted=not why, why=why, retry=retry)


def _own(job: Job, id: str, token: Token) -> Lease | None:
    """A lease, if this token may speak for it. Raises PermissionError."""
    lease = job.round.leases.get(id)
    if lease:
        _check(lease, token)
    return lease


def _check(lease: Lease, token: Token) -> None:
    if lease.owner != token.owner:
        raise PermissionError("the lease is of another device")
