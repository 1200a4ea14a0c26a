"""The trainer daemon: keeps a device's model and data, answers packets on a unix socket.

    python -m corolla.client.device.daemon SOCKET < settings of the device as JSON

It prints one line once it serves, {"examples": …, "model": …}, then "note: …" for each task that it
cannot do; or "error: …" when it cannot serve, and exits with 1 or 2. It ends when its standard
input is closed: with the process that started it.

The device has the last word: it uses its own model, data and limits whatever a server says, and
runs no strategy from a file that its owner has not allowed. What its examples have cost in privacy
stands in STATE/ledger.jsonl for its whole life, under whatever name it took part.
"""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corolla.client.device import machine
from corolla.client.device.settings import Own
from corolla.client.training.worker import Device, Worker
from corolla.config import schedule
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.federated import FederatedData
from corolla.errors import (
    ConfigError,
    CorollaError,
    DataError,
    SchemaError,
    StoppedError,
)
from corolla.host import logs
from corolla.host.processes import when_orphaned
from corolla.models import devices, pretrained, trainable
from corolla.models.pretrained import Base
from corolla.models.trainable import Trainable
from corolla.privacy import accounting, ledger
from corolla.privacy.ledger import Limit
from corolla.storage.disk import Room, held
from corolla.storage.memory import Memory
from corolla.strategies.listing import files
from corolla.version import __version__
from corolla.wire import rpc
from corolla.wire.messages import Capabilities, Reply, Task, pack_reply, unpack_reply, unpack_task
from corolla.wire.packet import Packet
from corolla.wire.rpc import Wanted
from corolla.wire.task_settings import RunSettings

_KEEP_DAYS = 30.0
_KEEP_RUNS = 16
"""Days and runs, at most, for which a device keeps files of runs that are over.

The files are personal adapters, and what codecs have left out of updates.
"""

_MOST_STEPS = 300_000
"""Steps of a run with dp=example, at most: accounting for more takes longer than the steps."""

_log = logs.logger("trainer")


class Trainer:
    """Answers packets as one client. One at a time: the model is one."""

    def __init__(
        self,
        own: Own,
        name: str,
        capabilities: Capabilities | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Reads the data and the model, so that what is wrong with them is said at once.

        `say` tells the owner why the device does not do what it is asked. Raises CorollaError.
        """
        self.own, self.name, self.capabilities, self._say = own, name, capabilities, say
        self._runs = own.state / "runs"
        self._known = ""
        self._resident: tuple[RunConfig, Trainable, FederatedData] | None = None
        self._worker: tuple[str, Worker] | None = None
        self._wanted: Wanted = lambda: True
        plain = self._within(self._config({"min_examples": 1, "max_length": 8}), 0)
        self.examples = len(self._data(plain, ()).clients[name].train)
        spent = own.state / ledger.NAME
        if own.epsilon and not spent.exists() and any(self._runs.glob("*")):
            _log.warning("no ledger of earlier runs: their cost is not counted", missing=spent)
        devices.set_threads(plain)
        self._first: tuple[str, Base] | None = None
        base = self._load(plain, [])
        self.model_sha256 = base.fingerprint
        self._first = (_key_of_base(plain, []), base)

    def __call__(self, packet: Packet, wanted: Wanted) -> Packet:
        """The reply to a packet. Raises WireError when its header cannot be read."""
        try:
            task = unpack_task(packet)
        except SchemaError as error:
            why = f"the server has another version of corolla than {__version__}: {error}"
            self._say(why)
            raise SchemaError(why) from error
        if task.refusal:
            why = f"the server refuses this client: {task.refusal}"
            self._say(why)
            return self._refusal(task, why)
        self._wanted = wanted
        with logs.bind(run=task.run_id, round=task.round, client=self.name):
            began, own = time.monotonic(), ""
            try:
                with accounting.while_wanted(wanted):
                    reply = self._for(task)(self.name, packet)
            except DataError as error:  # names a file, a line, and may quote it: for the owner
                own = str(error)
                reply = self._refusal(task, "this device's data cannot be used")
            except CorollaError as error:
                reply = self._refusal(task, str(error))
            except OSError as error:  # a full disk
                reply = self._refusal(task, f"this device fails: {error.strerror}")
            why = unpack_reply(reply, len(reply.payload)).error
            seconds = round(time.monotonic() - began, 3)
            _log.info("answered", kind=task.kind.name, seconds=seconds, error=why or None)
            if why:
                self._say(own or why)
        return reply

    def _refusal(self, task: Task, why: str) -> Packet:
        return pack_reply(
            Reply(task.run_id, task.round, task.base_version, task.kind, self.name, error=why)
        )

    def _for(self, task: Task) -> Worker:
        """The worker of a run: its settings on this device's model, its own memory on the disk."""
        told = RunSettings.from_json(task.config)
        labels = told.labels or ()
        config = self._within(self._config(told.run), len(labels))
        self._refuse_long(config)
        key = json.dumps([config.model_dump(mode="json"), [*labels]])
        if self._resident is None or key != self._known:
            self._worker = self._resident = None
            self._known = key
            gc.collect()  # the old model goes before the new one comes
            self._resident = self._set_up(config, labels)
        if self._worker is None or self._worker[0] != task.run_id:
            folder = self._runs / task.run_id
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            forget(self._runs, task.run_id, self.own.disk_limits.beside - held(self.own.models))
            memory = Memory(folder, room=Room(folder, self.own.disk_limits))
            config, model, own = self._resident
            limit = Limit(self.own.epsilon, self.own.delta) if self.own.epsilon else None
            device = Device(self.capabilities, self.own.state / ledger.NAME, limit)
            worker = Worker(config, model, own, memory, on_step=self._step, device=device)
            self._worker = (task.run_id, worker)
        os.utime(self._runs / task.run_id)
        return self._worker[1]

    def _refuse_long(self, config: RunConfig) -> None:
        """Raises ConfigError for more private steps than this device accounts for."""
        if config.dp != "example":
            return
        rounds = min(config.rounds, config.participations or config.rounds)
        if (steps := rounds * schedule.steps_per_round(config, self.examples)) > _MOST_STEPS:
            raise ConfigError(
                f"this device accounts for at most {_MOST_STEPS} steps of a run with dp=example, "
                f"found {steps}: lower rounds or local-steps, or set participations"
            )

    def _set_up(
        self, config: RunConfig, labels: Sequence[str]
    ) -> tuple[RunConfig, Trainable, FederatedData]:
        own = self._data(config, labels)
        devices.set_threads(config)
        base = self._load(config, labels)
        model = trainable.build(config, base)
        _log.info("model ready", model=base.fingerprint[:12], strategy=config.strategy)
        return config, model, own

    def _data(self, config: RunConfig, labels: Sequence[str]) -> FederatedData:
        return federated.load_device(
            config, self.name, labels, limited=self.own.epsilon is not None
        )

    def _config(self, run: Mapping[str, Any]) -> RunConfig:
        """A run's settings with this device's own put over them. Raises ConfigError."""
        own = self.own
        values = {
            **run,
            "strategy": files.allowed(str(run.get("strategy", "fedavg")), own.allow, "device"),
            "data": own.data,
            # No server chooses which columns of a device are read.
            **{"columns": own.columns, "splits": own.splits, "subset": own.subset},
            "engine": "inprocess",
            "device": own.device,
            "threads": own.threads,
            "quantization": own.quantization,
            "gradient_checkpointing": own.gradient_checkpointing,
            # Of the server: its files, and a start that it has made already.
            "model": "embedded",
            "availability": None,
            "public": None,
            "start": "random",
        }
        try:
            config = validate(values)
        except ConfigError as error:
            raise ConfigError(
                f"this device (corolla {__version__}) cannot do what the run asks: {error}"
            ) from error
        micro = own.micro_batch_size or config.micro_batch_size
        micro = micro and min(micro, config.batch_size)
        return config.model_copy(update={"micro_batch_size": micro, "model": own.model})

    def _within(self, config: RunConfig, labels: int) -> RunConfig:
        """The settings with which training stays within the memory that the owner gives to it.

        Raises ConfigError when none do.
        """
        if self.own.memory is None:
            return config
        changes, estimate = machine.fit(config, self.own.model, self.own.memory, labels)
        if changes:
            _log.info("fitted", memory=self.own.memory, estimate=estimate.total, **changes)
        return config.model_copy(update=changes)

    def _load(self, config: RunConfig, labels: Sequence[str]) -> Base:
        """The base model: the one read at the start where it was read alike."""
        first, self._first = self._first, None
        if first and first[0] == _key_of_base(config, labels):
            pretrained.check_length(config, first[1].model)
            return first[1]
        del first  # before another takes its place
        return pretrained.load(config, labels)

    def _step(self, tokens: int) -> None:
        """After each local step: nobody waits for the rest of a task whose time is over."""
        if not self._wanted():
            raise StoppedError("given up: the server no longer waits")


def forget(runs: Path, keep: str, most: int) -> None:
    """Delete what was kept of runs long over: the oldest, and those not asked for in a month.

    What is left of them has `most` bytes.
    """
    month = time.time() - _KEEP_DAYS * 86400
    others = [path for path in runs.iterdir() if path.is_dir() and path.name != keep]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    whole = 0
    for place, path in enumerate(others, start=1):
        whole += held(path)
        if place >= _KEEP_RUNS or path.stat().st_mtime < month or whole > most:
            _log.info("run forgotten", forgotten=path.name)
            shutil.rmtree(path, ignore_errors=True)


def _key_of_base(config: RunConfig, labels: Sequence[str]) -> str:
    """Returns, as JSON, the settings of a config that decide how a base model is loaded."""
    names = ["task", "dtype", "quantization", "device", "gradient_checkpointing"]
    names += ["new_tokens"]  # of the tokenizer, which comes with it
    names += ["seed", "new_head"] if labels else []  # of a new classifier's head
    return json.dumps([[getattr(config, name) for name in names], list(labels)])


def main(socket: Path) -> int:
    """Serve until the parent ends; the exit code says why not."""
    told = json.loads(sys.stdin.buffer.readline())
    own = Own.model_validate(told["own"])
    when_orphaned(lambda: os._exit(0))
    logs.configure(own.state / "log.jsonl")
    try:
        can = machine.probe(own.state)
        if own.memory:
            can = replace(can, memory_bytes=min(can.memory_bytes, own.memory))
        trainer = Trainer(own, told["name"], can, lambda line: print(f"note: {line}", flush=True))
        server = rpc.serve_trainer(trainer, socket)
    except CorollaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    ready = {"examples": trainer.examples, "model": trainer.model_sha256}
    _log.info("serving", **ready)
    print(json.dumps(ready), flush=True)
    server.wait_for_termination()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
