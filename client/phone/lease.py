"""A session's work: from a lease to the reply."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from corolla.client.phone import policies
from corolla.client.phone.alive import Alive
from corolla.client.phone.channel import Caller
from corolla.client.phone.downloads import fetch
from corolla.client.phone.kept import Kept
from corolla.errors import CorollaError, DataError, DiskLimitError, WireError
from corolla.host import logs
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.wire.packet import Packet

_LARGEST = 8 << 30
"""Bytes of a payload, at most."""

_log = logs.logger("phone")


class PhoneTrainer(Protocol):
    """The trainer on a phone: torch, or a native runtime."""

    def examples(self) -> int:
        """The number of examples that it may train on, at most."""

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        """The cached groups of a run (group → content id) that are not held here."""

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        """The reply, under that name, to a task whose missing groups are in its payload.

        `model` is the folder of the gateway's base model, None where the owner chose one. Ends
        within a step once `wanted` is false. Never raises for a task that cannot be done: that is
        an error in the reply.
        """


@dataclass
class Work:
    """The work of a phone for one lease: it fetches the task and trains."""

    lease: pb.Lease
    deadline: float
    caller: Caller
    kept: Kept
    trainer: PhoneTrainer
    model: Path | None
    """The folder of the gateway's base model; None where the owner chose one."""

    def task(self) -> tuple[update_pb2.Task, Packet | None]:
        """The task; where it cannot be read an empty one, and the reply that says so."""
        try:
            self.kept.ask("", [self.lease.task.size])
            return protocol.read_task(self._fetch(self.lease.task, protocol.MAX_TASK)), None
        except (WireError, DiskLimitError) as error:
            task = update_pb2.Task()
            return task, self._given_up(task, f"the task cannot be read: {error}")

    def train(self, task: update_pb2.Task, alive: Alive) -> Packet:
        """The trainer's reply, or one that says why there is none."""
        lease, clock = self.lease, self.caller.clock
        policy, now = self.kept.policy(lease.policy), clock.date()
        past = self.kept.history(now)
        if soon := policies.with_lease(policy, past, task.run_id, task.round, now):
            return self._given_up(task, f"policy: {policies.in_words(soon)}")
        try:
            packet = self.assembled(task)
        except WireError as error:
            return self._given_up(task, str(error))
        except DiskLimitError as error:
            self.caller.tell(str(error))
            return self._given_up(task, str(error))
        began = clock.now()
        try:
            reply = self.trainer.answer(lease.client, packet, self.model, alive.check)
        except DataError as error:  # names a file, a line, and may quote it: for the owner
            self.caller.tell(str(error))
            return self._given_up(task, "this device's data cannot be used")
        except CorollaError as error:
            return self._given_up(task, str(error))
        except OSError as error:  # a full disk
            return self._given_up(task, f"this device fails: {error.strerror}")
        _log.info("trained", round=task.round, seconds=round(clock.now() - began, 3))
        if alive.why:
            return self._given_up(task, f"given up: {alive.why}")
        if len(reply.payload) > lease.max_upload_bytes:
            return self._given_up(task, "the update is larger than is taken")
        try:
            self.kept.ask(task.run_id, [len(reply.payload)])
        except DiskLimitError as error:
            self.caller.tell(str(error))
            return self._given_up(task, str(error))
        return reply

    def assembled(self, task: update_pb2.Task) -> Packet:
        """The task with what is lacking here of its cached groups."""
        lease = self.lease
        protocol.check_id(task.run_id)  # these become names of files
        wanted = {blob.group: protocol.check_id(blob.content) for blob in lease.cached}
        self.kept.drop_parts({blob.sha256 for blob in (lease.payload, *lease.cached)})
        lacking = set(self.trainer.missing(task.run_id, wanted))
        coming = [lease.payload, *(blob for blob in lease.cached if blob.group in lacking)]
        self.kept.ask(task.run_id, [blob.size for blob in coming if not blob.inline])
        payload = self._fetch(lease.payload, _LARGEST)
        groups = [self._fetch(blob, _LARGEST) for blob in lease.cached if blob.group in lacking]
        return protocol.with_groups(task, payload, groups)

    def _fetch(self, blob: pb.Blob, most: int) -> bytes:
        def download(request: pb.DownloadRequest, size: int) -> pb.Chunk:
            return self.caller.download(request, size, self.deadline)

        return fetch(blob, self.kept.folder, download, most)

    def _given_up(self, task: update_pb2.Task, why: str) -> Packet:
        return protocol.given_up(task, self.lease.client, why)
