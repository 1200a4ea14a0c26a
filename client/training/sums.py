"""Clients whose updates go to secure sums: each trains, quantises its update and masks it."""

import os
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.aggregation.sums import summable
from corolla.client.training.worker import Received, Worker
from corolla.errors import DivergedError, SecureSumError
from corolla.sums import keeper, vectors
from corolla.sums import task as task_of
from corolla.sums.device import Device, Owner, refuse_plain
from corolla.sums.messages import Listing, Prepare, Question, Session
from corolla.sums.quantise import Contribution, quantise, rounding
from corolla.sums.ring import Vector
from corolla.sums.roster import Roster
from corolla.wire.messages import Reply, Task


class SumWorker(Worker):
    """A worker whose clients are members of secure sums, each with keys of its own.

    What would be in clear beside a masked vector, as losses and numbers of examples, is in it.
    """

    def __init__(self, smallest: int, corrupt: int | None, *given: Any) -> None:
        super().__init__(*given)
        names = sorted(self.data.clients)
        keys = [Ed25519PrivateKey.from_private_bytes(os.urandom(32)) for _ in names]
        public = [key.public_key().public_bytes_raw() for key in keys]
        self.roster = Roster(tuple(zip(names, public, strict=True)))
        self.devices = {
            name: Device(Owner(self.roster, index, smallest, corrupt), key, set())
            for index, (name, key) in enumerate(zip(names, keys, strict=True))
        }
        self._listing: Listing | None = None

    def session(self, member: str, run: bytes) -> Session | None:
        """The session of a client for a run."""
        return self.devices[member].session(run)

    def prepare(self, member: str, call: bytes) -> bytes | None:
        """The deposit of a client; None where it refuses the attempt."""
        try:
            return self.devices[member].prepare(Prepare.unpack(call)).pack()
        except SecureSumError:
            return None

    def announce(self, listing: bytes) -> None:
        """Hear who has deposited, before the tasks of the round come."""
        self._listing = Listing.unpack(listing)

    def answer(self, member: str, question: bytes) -> bytes | None:
        """The shares of a client; None where it refuses the question."""
        try:
            return keeper.answer(self.devices[member], Question.unpack(question)).pack()
        except SecureSumError:
            return None

    def _train(self, client: str, task: Task, received: Received, blank: Reply) -> Reply:
        device = self.devices[client]
        if self._listing is None:
            refuse_plain(device.owner, "TRAIN")
            return blank
        device.begin(self._listing, self._digest(task, received))
        try:
            reply = super()._train(client, task, received, blank)
        except DivergedError as error:  # its text has a loss, or a value of the update
            raise DivergedError("what was trained is not finite: lower lr") from error
        return replace(blank, payload=device.mask(self._vector(device, task, reply)).pack())

    def _evaluate(self, client: str, received: Received, blank: Reply) -> Reply:
        refuse_plain(self.devices[client].owner, "EVALUATE")
        return blank

    def _vector(self, device: Device, task: Task, reply: Reply) -> Vector:
        """The whole numbers of an update, with its weight and its loss."""
        partial, weight = summable(self.strategy.aggregator()), reply.num_examples
        if partial is None or device.accepted is None:
            raise SecureSumError("updates of this strategy are not added up")
        if weight < 1:
            raise SecureSumError("nothing was trained on")
        alike = self.config.dp == "client"  # nobody weighs more than others
        weight = 1 if alike else weight
        partial.add(self.uplink.open(reply), float(weight))
        values = vectors.flatten(partial.finalise() if alike else partial.sums()) / weight
        quantiser, index = device.accepted.call.quantiser, device.owner.index
        update = Contribution(values, weight, reply.metrics.get("train_loss", 0.0))
        words = rounding(self.config.seed, task.round, index, quantiser.size)
        return quantise(quantiser, update, words)

    def _digest(self, task: Task, received: Received) -> bytes:
        """The hash of a task as it has come, of a log by the version that its rows lead to."""
        settings, log = received.settings, task.log
        common = task_of.Common(settings.run, task.round, settings.lora, settings.population)
        sent = self.downlink.open(task, settings.like)
        alike = {group: own for group, own in sent.items() if not (log and log.start)}
        groups = {**alike, **self.memory.recall(task.cached)}
        version = log.version if log else task.base_version
        return task_of.digest(common, task.model_sha256, version, groups)
