"""A task of a gateway in progress: what its phones are told, and what they have sent so far."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corolla.phones.budget import Demand
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.leases import Lease, OfferRound, Phase
from corolla.server.gateway.merging import Merging
from corolla.server.gateway.outbound import Parcel
from corolla.server.gateway.uploads import Upload
from corolla.server.rounds import gate
from corolla.server.rounds.verdicts import Code, Verdict
from corolla.wire.packet import Packet

_VERSIONS = 4
"""Versions of a log for which one lease is told its task: each may be a header of megabytes."""
NO_PROGRAMS = "this gateway has no programs for native devices"


@dataclass
class Job:
    """A task in progress. `round` changes under the gateway's lock, what phones send beside it."""

    digest: str
    parcel: Parcel
    merging: Merging
    round: OfferRound
    demand: Demand | str = NO_PROGRAMS
    """Of native phones, or why none of them can do this task."""
    uploads: dict[str, Upload] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    """Lease → header of its valid reply."""
    versions: dict[str, set[str]] = field(default_factory=dict)
    """Lease → versions of the log from which its phone has asked to go on."""
    replaced: bool = False
    merging_now: bool = False
    reply: Packet | None = None

    def told(self, lease: Lease, log_version: str) -> tuple[pb.Blob, list[pb.Blob]]:
        """(the task's header for a phone, the groups beside it).

        Raises ValueError for a phone that says of ever more versions that it has them.
        """
        known = log_version if log_version in self.parcel.versions else ""
        asked = self.versions.setdefault(lease.id, set())
        if known not in asked and len(asked) >= _VERSIONS:
            raise ValueError(f"it was told for {_VERSIONS} versions of the log")
        asked.add(known)
        if lease.assigned:
            return self.parcel.native(log_version, lease.assigned.kind)
        return self.parcel.header(log_version)

    def most_bytes(self, lease: Lease) -> int:
        """Returns the bytes that a phone may upload: the need of an honest reply of its class."""
        return gate.most_bytes(self.merging.expected(f"{lease.device}/", 1, kind_of(lease)))

    def upload(self, lease: Lease, spool: Path) -> Upload:
        """Where the payload of a phone's reply goes to."""
        found = self.uploads.get(lease.id)
        if found is None:
            found = self.uploads[lease.id] = Upload(spool, self.most_bytes(lease))
        return found

    def judge(self, lease: Lease, client: str, header: bytes) -> Verdict:
        """The verdict on a reply, its payload as it was uploaded."""
        upload = self.uploads.get(lease.id)
        try:
            packet = Packet(header, upload.payload() if upload else b"")
        except (OSError, ValueError):
            return Verdict(Code.NO_ANSWER, "the gateway's disk fails, or the round has ended")
        return self.merging.judge(packet, client, lease.examples, kind_of(lease)).verdict

    def replies(self, gateway: str) -> Iterator[tuple[str, int, str | None, Packet]]:
        """The valid ones, in the order in which a server would fold in clients of these names."""
        valid = [own for own in self.round.leases.values() if own.phase == Phase.VALID]
        for lease in sorted(valid, key=lambda own: f"{gateway}/{own.device}"):
            upload, header = self.uploads.get(lease.id), self.headers[lease.id]
            packet = upload.packet(header) if upload else Packet(header, b"")
            yield f"{gateway}/{lease.device}", lease.examples, kind_of(lease), packet

    def budgets(self) -> Mapping[str, int]:
        """How many leases went to native phones of each class of memory."""
        native = (own.assigned for own in self.round.leases.values() if own.assigned)
        return Counter(f"budget_{assigned.budget}" for assigned in native)

    def drop_lost(self) -> None:
        """Forget what phones sent that vanished: each upload may hold a file open."""
        for id in list(self.uploads):
            if self.round.leases[id].phase == Phase.LOST:
                self.uploads.pop(id).close()

    def close(self) -> None:
        """Forget what phones sent."""
        for upload in list(self.uploads.values()):  # a report may take one away meanwhile
            upload.close()
        self.uploads.clear()
        self.headers.clear()


def kind_of(lease: Lease) -> str | None:
    """The class that a native phone trains as; None: that of its gateway."""
    return lease.assigned.kind if lease.assigned else None


class Rounds:
    """The task in progress and the round before it: what both sides of a gateway share.

    The lock of `changed` guards them, the round of the task, and the roster of phones.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.job: Job | None = None
        self.before: OfferRound | None = None

    def begin(self, job: Job) -> None:
        """Phones may have leases of a task from now on."""
        with self.changed:
            self.job = job
            self.changed.notify_all()

    def replace(self) -> None:
        """The task in progress ends without a reply: its server does not wait for it any more."""
        with self.changed:
            old, self.job = self.job, None
            if old:
                old.replaced = True
            self.changed.notify_all()
        if old:
            old.close()

    def end(self, job: Job) -> None:
        """The round of a task is over: what phones send from now on is not taken in."""
        with self.changed:
            job.merging_now = True
            self.job, self.before = None, job.round
