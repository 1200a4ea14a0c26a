"""Tasks as a server sends them, and the replies of Python's worker and of the native trainer."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.client.training.worker import Worker, encode_all
from corolla.config.run import RunConfig
from corolla.data import encoding, federated
from corolla.directions import seedlog
from corolla.models import pretrained, trainable
from corolla.server.rounds.tasks import run_settings
from corolla.storage.memory import Memory
from corolla.types import Payload
from corolla.wire import codec, messages
from corolla.wire.messages import Kind, Log, Reply, Task, pack_task, unpack_reply
from corolla.wire.packet import Packet
from tests.bundles import Exported

RUN = "ab" * 16


def config(**changes: Any) -> RunConfig:
    """A run whose steps are few; on the embedded model, if `changes` do not say another."""
    values: dict[str, Any] = {
        "rounds": 9,
        "clients": 4,
        "cohort": 2,
        "rank": 8,
        "alpha": 12.0,
        "local_steps": 4,
        "batch_size": 3,
        "micro_batch_size": 1,
        "max_length": 64,
        "threads": 1,
        "device": "cpu",
    }
    return RunConfig(**{**values, **changes})


@dataclass
class Case:
    """A run with a worker in Python, and a device in C++ with the rows of one of its clients."""

    worker: Worker
    bundle: Path
    folder: Path
    check: Path

    @property
    def client(self) -> str:
        return next(iter(self.worker.data.clients))

    @property
    def first(self) -> Payload:
        """The server's state before all rounds."""
        own = self.worker
        start = own.model.init(own.config.lora, seeds.derive(own.config.seed, "init"))
        return own.strategy.init(start, own.config.seed)

    @property
    def origin(self) -> str:
        return seedlog.origin(self.worker.model.base.fingerprint, self.first)

    def task(
        self,
        state: Payload | None = None,
        round: int = 1,
        kind: str = "",
        since: int = 0,
        lacks: bool = True,
        **changes: Any,
    ) -> Task:
        """The task of a device that holds the first `since` rows of a log.

        With `lacks` cached groups are in the payload, and so is the fresh adapter of a log.
        """
        own, extra = self.worker, dict[str, Any]()
        broadcast = own.strategy.broadcast(self.first if state is None else state)
        groups = {**broadcast.payload, **(broadcast.cached if lacks else {})}
        if broadcast.log is not None:
            versions = seedlog.versions(self.origin, broadcast.log)
            rows = broadcast.log[since:]
            extra["log"] = Log(versions[0], versions[since], versions[-1], rows, len(versions) - 1)
            if lacks and not since:
                groups["first"] = self.first["start"]
        payload, scalars = messages.enclose(groups)
        settings = {
            "lora": vars(own.config.lora),
            "class": kind,
            "population": 4,
            "accepted": 0,
            "run": run_settings(own.config, True),
        }
        cached = {group: codec.content_id(params) for group, params in broadcast.cached.items()}
        values = {
            "run_id": RUN,
            "round": round,
            "base_version": "v",
            "kind": Kind.TRAIN,
            "config": json.dumps(settings),
            "cached": cached,
            "payload": payload,
            "scalars": scalars,
            "model_sha256": own.model.base.fingerprint,
            **extra,
        }
        return Task(**{**values, **changes})

    def python(self, task: Task) -> Reply:
        """The reply of Corolla's own worker. It makes the first state of a log itself."""
        return unpack_reply(self.worker(self.client, pack_task(task)), 1 << 30)

    def native(self, task: Task, method: str, program: str = "fp32", **more: Any) -> Reply:
        """The reply of the native trainer, which must not fail otherwise than by a reply."""
        done = self.run(task, method, program, **more)
        assert done.returncode == 0, done.stderr
        header, payload = (self.folder / f"out.{name}" for name in ("header", "payload"))
        return unpack_reply(Packet(header.read_bytes(), payload.read_bytes()), 1 << 30)

    def run(
        self,
        task: Task,
        method: str,
        program: str = "fp32",
        kind: str = "",
        passes: int | None = None,
        length: int = 0,
        state: str = "state",
        tokens: Path | None = None,
        bundle: Path | None = None,
        header: bytes | None = None,
    ) -> subprocess.CompletedProcess[str]:
        packet = pack_task(task)
        (self.folder / state).mkdir(exist_ok=True)
        (self.folder / "task").write_bytes(packet.header if header is None else header)
        (self.folder / "payload").write_bytes(packet.payload)
        told = {"kind": kind, "program": program, "method": method, "rank": 8, "length": length}
        paths = [self.folder / name for name in ("task", "payload")]
        out = [self.folder / f"out.{name}" for name in ("header", "payload")]
        return call(
            self.check,
            *("answer", bundle or self.bundle, tokens or self.tokens(), self.folder / state),
            *(self.client, *paths, json.dumps(told), *out),
            *([] if passes is None else [passes]),
        )

    def tokens(self) -> Path:
        """The token file of the client."""
        path = self.folder / "tokens.jsonl"
        if not path.exists():
            own = self.worker
            encoder = encoding.Encoder(own.model.base.tokenizer, (), own.config.max_length)
            found, _ = encode_all(encoder, own.data.clients[self.client].train)
            write_tokens(path, found)
        return path


def case(folder: Path, bundle: Exported, check: Path, **changes: Any) -> Case:
    own = config(**{"model": bundle.model, **changes})
    worker = Worker(
        own, trainable.build(own, pretrained.load(own)), federated.load(own), Memory(folder)
    )
    return Case(worker, bundle.folder, folder, check)


def write_tokens(path: Path, sequences: Sequence[encoding.Encoded]) -> None:
    rows = (
        {"input_ids": list(s.input_ids), "labels": list(labels), "example": s.example}
        for s in sequences
        if not isinstance(labels := s.labels, int)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def farthest(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of two trees of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
