"""A gateway's native phones: what a round asks of them, and who runs which program."""

from dataclasses import dataclass, replace

from corolla.errors import WireError
from corolla.phones.budget import Assignment, Demand
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.blobs import Blobs
from corolla.server.gateway.job import NO_PROGRAMS, Job
from corolla.server.gateway.merging import Merging
from corolla.server.gateway.programs import Programs, to_message
from corolla.wire import codec
from corolla.wire.messages import Log, Task


@dataclass(frozen=True)
class Denied:
    """Why a phone gets no task: fields of the message Refusal."""

    reason: "pb.Refusal.Reason"
    text: str
    files: pb.Blob | None = None
    assigned: Assignment | None = None

    def message(self) -> pb.Refusal:
        """To be sent."""
        told = to_message(self.assigned)
        return pb.Refusal(
            reason=self.reason, text=self.text, base_model=self.files, assignment=told
        )


class Natives:
    """The native phones of a gateway that has programs for them, or none (`programs` is None)."""

    def __init__(self, programs: Programs | None, blobs: Blobs) -> None:
        self._programs, self._blobs = programs, blobs
        self._last = Demand()  # nobody fetches another program between two rounds
        self._first: tuple[tuple[str, str], tuple[str, bytes]] | None = None

    def begin(self, merging: Merging, task: Task) -> tuple[Demand | str, pb.Blob | None]:
        """(what is asked of them, or why they can do nothing; the first state of a log)."""
        if self._programs is None:
            return NO_PROGRAMS, None
        demand, first = self._programs.demand(merging), None
        if isinstance(demand, str):
            return demand, None
        if task.log:
            try:
                content, data = self._first_of(self._programs, merging, task.log)
            except WireError as error:
                return str(error), None
            first = self._blobs.put(data, "first", content)
        self._last = demand
        return demand, first

    def _first_of(self, programs: Programs, merging: Merging, log: Log) -> tuple[str, bytes]:
        """(content id, bytes) of a run's first state: built once, and held. Raises WireError."""
        run = merging.task.run_id, log.origin
        if self._first is None or self._first[0] != run:
            start = programs.first(merging, log)
            self._first = run, (codec.content_id(start), codec.encode({"first": start}))
        return self._first[1]

    def assign(
        self, request: pb.CheckInRequest, device: str, job: Job | None, now: float
    ) -> Assignment | Denied:
        """Returns a phone's Assignment, the same as long as it has a lease, or why it is Denied."""
        if self._programs is None:
            return Denied(pb.Refusal.REASON_MODEL, NO_PROGRAMS)
        demand = self._last
        if job:
            own = job.round.expire(now).open_to(device)
            if own and own.assigned:
                return own.assigned
            if isinstance(job.demand, str):
                return Denied(pb.Refusal.REASON_NO_TASK, job.demand)
            demand = replace(job.demand, seconds=max(0.0, job.round.deadline - now))
        found = self._programs.assign(request, demand)
        if isinstance(found, str):
            return Denied(pb.Refusal.REASON_NOT_ELIGIBLE, found)
        return found

    def lacks(self, assigned: Assignment, manifest: str) -> Denied | None:
        """The refusal of a phone that has not the files of its program; None if it has."""
        files = self._programs.files(assigned) if self._programs else None
        if files and manifest == files.sha256:
            return None
        text = f"get program {assigned.program}"
        return Denied(pb.Refusal.REASON_MODEL, text, files, assigned)
