"""Check-ins of phones: which of them is eligible, who gets a lease, and why others get none."""

import secrets
from collections.abc import Callable
from pathlib import Path

from corolla.errors import WireError
from corolla.host import logs
from corolla.phones import protocol
from corolla.phones.budget import Assignment
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.access import Token
from corolla.server.gateway.job import Job, Rounds
from corolla.server.gateway.leases import Lease, OfferRound
from corolla.server.gateway.natives import Denied, Natives
from corolla.server.gateway.programs import run_as, to_message
from corolla.server.gateway.roster import Roster, Seen
from corolla.server.gateway.settings import GatewaySettings
from corolla.wire import limits, messages

_log = logs.logger("gateway")


class CheckIns:
    """Answers phones that ask for work. Thread-safe."""

    def __init__(
        self,
        settings: GatewaySettings,
        rounds: Rounds,
        roster: Roster,
        natives: Natives,
        model: pb.Blob | None,
        clock: Callable[[], float],
    ) -> None:
        """`model` is the Manifest of the base model that is offered, if any is."""
        self._settings, self._clock = settings, clock
        self._rounds, self._roster = rounds, roster
        self._natives, self._model = natives, model
        self.policy = pb.Policy(**vars(settings.policy))

    def answer(self, request: pb.CheckInRequest, token: Token) -> pb.CheckInResponse:
        """A lease, or why there is none and when to come back."""
        found = self._lease(request, token, self._clock())
        retry, policy = self._roster.retry(token.owner), self.policy
        if isinstance(found, Denied):
            return pb.CheckInResponse(refusal=found.message(), retry=retry, policy=policy)
        return pb.CheckInResponse(lease=found, retry=retry, policy=policy)

    def _lease(self, request: pb.CheckInRequest, token: Token, now: float) -> pb.Lease | Denied:
        if denied := _unheard(request, token):
            return denied
        noted = self._note(request, token, now)
        if isinstance(noted, Denied):
            return noted
        job, assigned = noted
        return self._lacks(request, assigned) or self._seat(request, token, job, assigned, now)

    def _note(
        self, request: pb.CheckInRequest, token: Token, now: float
    ) -> tuple[Job | None, Assignment | None] | Denied:
        """A phone is there: (the task in progress, what a native phone is to run of it)."""
        device, examples = request.device, _examples(request)
        unfit = self._unfit(request)
        with self._rounds.changed:
            if self._roster.refuses(device, token, now):
                text = f"another device is called {device!r}"
                return Denied(pb.Refusal.REASON_NAME, text)
            job, native = self._rounds.job, request.HasField("native")
            assigned = self._natives.assign(request, device, job, now) if native else None
            eligible = not unfit and not isinstance(assigned, Denied)
            self._roster.note(device, Seen(token.owner, examples, now, eligible))
        if unfit:
            return Denied(pb.Refusal.REASON_NOT_ELIGIBLE, unfit)
        return assigned if isinstance(assigned, Denied) else (job, assigned)

    def _unfit(self, request: pb.CheckInRequest) -> str:
        """Returns why a phone by its own words does not meet the policy; "" when it is eligible."""
        policy, examples = self._settings.policy, _examples(request)
        if lacks := policy.lacks(messages.load_capabilities(request.capabilities)):
            return f"it is not {lacks}"
        if examples < max(1, policy.examples):
            least = f", not {policy.examples}" if examples else ""
            return f"it has {examples or 'no'} examples{least}"
        return ""

    def _lacks(self, request: pb.CheckInRequest, assigned: Assignment | None) -> Denied | None:
        """The refusal of a phone that has not the files it would train with; None if it has."""
        if assigned:
            return self._natives.lacks(assigned, request.manifest)
        if request.own_model or (self._model and request.manifest == self._model.sha256):
            return None
        text = "get the base model" if self._model else "this gateway offers no base model"
        return Denied(pb.Refusal.REASON_MODEL, text, self._model)

    def _seat(
        self,
        request: pb.CheckInRequest,
        token: Token,
        job: Job | None,
        assigned: Assignment | None,
        now: float,
    ) -> pb.Lease | Denied:
        """A lease of a task, if it has a seat left and is in progress still."""
        reason, id = pb.Refusal.REASON_NO_TASK, secrets.token_hex(16)
        with self._rounds.changed:
            if job is None or self._rounds.job is not job:  # what is assigned is of one round alone
                return Denied(reason, "no round")
            round, lease = job.round.check_in(
                request.device, token.owner, _examples(request), id, now, assigned
            )
            if isinstance(lease, Lease):
                try:
                    told = self._told(job, round, lease, request.log_version, now)
                except ValueError as error:
                    return Denied(reason, f"the task cannot be told: {error}")
            job.round = round
            job.drop_lost()
        if isinstance(lease, str):
            return Denied(reason, lease)
        client = self._settings.client(lease.device)
        _log.info("lease", client=client, **run_as(lease.assigned))
        return told

    def _told(
        self, job: Job, round: OfferRound, lease: Lease, log_version: str, now: float
    ) -> pb.Lease:
        """A lease for its phone. Raises ValueError for a task that is too long to be told."""
        header, cached = job.told(lease, log_version)
        return pb.Lease(
            id=lease.id,
            client=self._settings.client(lease.device),
            task=header,
            payload=job.parcel.payload,
            cached=cached,
            strategy=Path(job.merging.config.strategy).name,
            phase="train",
            policy=self.policy,
            seconds=lease.ends - now,
            deadline_seconds=round.deadline - now,
            max_upload_bytes=job.most_bytes(lease),
            assignment=to_message(lease.assigned),
        )


def _unheard(request: pb.CheckInRequest, token: Token) -> Denied | None:
    """Why a phone is not even noted: another protocol, or a name that it cannot have."""
    if request.protocol != protocol.PROTOCOL:
        text = f"this gateway speaks version {protocol.PROTOCOL}, not {request.protocol}"
        return Denied(pb.Refusal.REASON_PROTOCOL, text)
    try:
        device = protocol.check_device(request.device)
    except WireError as error:
        return Denied(pb.Refusal.REASON_NAME, str(error))
    if token.device not in ("", device):
        return Denied(pb.Refusal.REASON_NAME, f"this token is of device {token.device!r}")
    return None


def _examples(request: pb.CheckInRequest) -> int:
    return min(request.num_examples, limits.MAX_EXAMPLES)
