"""The contents of its task that a gateway passes on: to each phone what that phone lacks, as blobs.

A gateway is to its phones what a server is to it: it remembers cached groups and the rows of a log,
and a phone that missed rounds gets them from here.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corolla.errors import WireError
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.blobs import Blobs
from corolla.storage.memory import Memory
from corolla.types import Params, Payload
from corolla.wire import codec
from corolla.wire.limits import MAX_ROWS
from corolla.wire.messages import Log, Task, pack_task
from corolla.wire.task_settings import TaskSettings

_LONGEST_LOG = 4 << 20
"""Bytes of rows: half of a header."""


@dataclass(frozen=True)
class Parcel:
    """A task for phones. Row by row, its log leads through `versions`, from that of `snapshot` on.

    `first` is the adapter that a run with a log began from, which native phones cannot make. They
    need it where there is no snapshot.
    """

    task: Task
    blobs: Blobs
    payload: pb.Blob
    cached: Sequence[pb.Blob]
    versions: Sequence[str] = ()
    snapshot: pb.Blob | None = None
    first: pb.Blob | None = None

    def header(self, log_version: str) -> tuple[pb.Blob, list[pb.Blob]]:
        """(the header for a phone that has this version of the log, the groups beside it)."""
        return self._header(self.task, log_version, self.cached)

    def native(self, log_version: str, kind: str) -> tuple[pb.Blob, list[pb.Blob]]:
        """As `header`, for a native phone that trains as one of a class."""
        told = replace(TaskSettings.from_json(self.task.config), kind=kind)
        cached = [*self.cached]
        if self.first and not self.snapshot and log_version not in self.versions:
            cached.append(self.first)
        named = {blob.group: blob.content for blob in cached}
        task = replace(self.task, config=told.to_json(), cached=named)
        return self._header(task, log_version, cached)

    def _header(
        self, task: Task, log_version: str, cached: Sequence[pb.Blob]
    ) -> tuple[pb.Blob, list[pb.Blob]]:
        log = task.log
        if log is None:
            return self.blobs.lend(pack_task(task).header), [*cached]
        known = log_version in self.versions
        at = self.versions.index(log_version) if known else 0
        start = self.snapshot if not known else None
        own = replace(
            log,
            since=self.versions[at],
            rows=log.rows[at:],
            start=start.content if start else "",
        )
        header = pack_task(replace(task, log=own)).header
        return self.blobs.lend(header), [*cached, *([start] if start else [])]

    @property
    def names(self) -> set[str]:
        """The blobs that all phones share."""
        shared = (self.payload, self.snapshot, self.first, *self.cached)
        return {blob.sha256 for blob in shared if blob}


class RunStore:
    """The store of one run: its groups and its log on disk, and the blobs made of them."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._folder, self._blobs = folder, blobs
        self._cached: Sequence[pb.Blob] = ()
        self._memory: tuple[str, Memory] | None = None

    def take_in(self, task: Task) -> Parcel | list[str]:
        """A task as phones get it, or the groups that must be sent again. Raises WireError."""
        parcel = take_in(task, self._memory_of(task.run_id), self._blobs, self._cached)
        if isinstance(parcel, Parcel):
            self._cached = parcel.cached
        return parcel

    def _memory_of(self, run_id: str) -> Memory:
        """The storage of a run; that of other runs is deleted."""
        if self._memory is None or self._memory[0] != run_id:
            for old in self._folder.glob("*"):
                if old.name != run_id:
                    shutil.rmtree(old, ignore_errors=True)
            self._memory = (run_id, Memory(self._folder / run_id))
        return self._memory[1]


def take_in(
    task: Task, memory: Memory, blobs: Blobs, before: Sequence[pb.Blob] = ()
) -> Parcel | list[str]:
    """A gateway's task as its phones get it, or the groups that must be sent again.

    `before` are blobs of the task before, which need not be made again. Raises WireError for
    content that is not what was announced.
    """
    sent = codec.decode(task.payload) if task.payload else {}
    for group in task.cached.keys() & sent.keys():
        memory.keep(group, sent[group], task.cached[group])
    missing = memory.missing(task.cached)
    log = _follow(task.log, sent, memory) if task.log else None
    if log and task.log and not task.log.start and _long(log[0]):
        log = None  # a snapshot is shorter
    if missing or (task.log and log is None):
        memory.recall({})
        return missing or ["log"]
    memory.prune(task.cached)
    offered = {(blob.group, blob.content): blob for blob in before}
    cached = [
        offered.get((group, content))
        or blobs.put(codec.encode(memory.recall({group: content})), group, content)
        for group, content in task.cached.items()
    ]
    memory.recall({})  # on disk is enough from here on
    snapshot = log and log[1]
    taken = {*task.cached, *({"start"} if task.log and task.log.start else ())}
    own = {group: params for group, params in sent.items() if group not in taken}
    data = codec.encode(own) if own else b""
    told = replace(task, config=_settings(task), payload=data, seats=0, log=log and log[0])
    return Parcel(
        told,
        blobs,
        blobs.put(data),
        cached,
        log[2] if log else (),
        blobs.put(codec.encode({"start": snapshot}), "start", codec.content_id(snapshot))
        if snapshot is not None
        else None,
    )


def _follow(log: Log, sent: Payload, memory: Memory) -> tuple[Log, Params | None, list[str]] | None:
    """(the whole log that is held, the snapshot it begins with, its versions); None: a gap."""
    if log.start:
        if codec.content_id(sent.get("start", {})) != log.start:
            raise WireError("the snapshot does not match its content id")
        memory.keep_start(log.since, sent["start"], log.number - len(log.rows))
    if memory.extend(log.since, log.rows) != log.version:
        raise WireError(f"{len(log.rows)} rows do not lead to version {log.version[:8]}")
    known = memory.log(log.version, log.origin)
    if known is None:
        return None
    snapshot, rows, _ = known
    versions = memory.path_to(log.version, log.origin)
    return replace(log, since=versions[0], rows=rows, start=""), snapshot, versions


def _long(log: Log) -> bool:
    """Returns whether a log is too long for phones: it has to fit into a task's header."""
    sizes = (t.numel() * t.element_size() for row in log.rows for t in row.values())
    return len(log.rows) > MAX_ROWS or sum(sizes) > _LONGEST_LOG


def _settings(task: Task) -> str:
    """Phones have no phones, and come and go: nothing they keep is counted on."""
    return replace(TaskSettings.from_json(task.config), fresh=None, accepted=0).to_json()
