"""Attacks that were tried on Corolla, each as a test.

A test shows first that the attack succeeds where the defence is taken out, then that it fails on
the code as it is. Here is a device as its owner starts it, with tasks of a hostile server.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla import seeds
from corolla.client.device.daemon import Trainer
from corolla.client.device.settings import Own
from corolla.config.run import RunConfig
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import Params
from corolla.wire import messages
from corolla.wire.messages import Kind, Reply, Task, pack_task, unpack_reply

SERVERS_OWN = ("model", "data", "engine", "device", "threads")


def device(
    folder: Path, model: Path, rows: Sequence[Mapping[str, Any]], **settings: Any
) -> Trainer:
    """A device with these rows, whose owner has set a limit that so few tasks do not reach.

    `settings` are others of its owner.
    """
    folder.mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"server": "localhost:1", "data": str(data), "model": str(model), "threads": 1}
    state = {"state": folder / "state", "device": "cpu", "epsilon": 1e9}
    return Trainer(Own.model_validate({**values, **state, **settings}), "ada")


@dataclass(frozen=True)
class Server:
    """A server that asks for steps with dp=example, with whatever numbers it likes."""

    config: RunConfig
    model: LoraModel
    start: Params

    @classmethod
    def of(cls, model: Path, **changes: Any) -> "Server":
        """One step of SGD on all rows, from the usual first adapter of rank 1."""
        values: dict[str, Any] = {
            "model": str(model),
            "dp": "example",
            "noise_multiplier": 1.0,
            "rounds": 1000,
            "local_steps": 1,
            "batch_size": 1024,
            "micro_batch_size": 16,
            "optimizer": "sgd",
            "lr": 1.0,
            "schedule": "constant",
            "rank": 1,
            "max_length": 32,
            "device": "cpu",
        }
        config = RunConfig(**{**values, **changes})
        resident = LoraModel(pretrained.load(config))
        return cls(config, resident, resident.init(config.lora, seeds.derive(0, "init")))

    def task(self, round: int = 1, start: Params | None = None, **numbers: Any) -> Task:
        """The task of a round; `numbers` are keys of the run, whatever their ranges."""
        run = {**self.config.model_dump(mode="json"), **numbers}
        lora = {**dataclasses.asdict(self.config.lora), "alpha": run["alpha"]}
        told = {
            "lora": lora,
            "class": "",
            "population": 2,
            "accepted": 0,
            "run": {key: value for key, value in run.items() if key not in SERVERS_OWN},
        }
        payload, scalars = messages.enclose({"adapter": self.start if start is None else start})
        text = json.dumps(told)
        return Task("ab" * 16, round, "v", Kind.TRAIN, text, {}, payload, scalars)

    def gradient(self, sequence: Sequence[int], targets: int, start: Params) -> dict[str, Tensor]:
        """Of transformers' own loss of one row, at scaling 1: what the server can compute as well.

        `targets`: how many tokens at the end of the row count.
        """
        self.model.write(start, dataclasses.replace(self.config.lora, alpha=1.0))
        trained = dict(self.model.parameters())
        for parameter in trained.values():
            parameter.requires_grad_(True)
        ids = torch.tensor([list(sequence)])
        labels = ids.clone()
        labels[:, :-targets] = -100
        loss = self.model.model(input_ids=ids, labels=labels).loss
        found = torch.autograd.grad(loss, list(trained.values()))
        return dict(zip(trained, found, strict=True))


def answer(trainer: Trainer, task: Task) -> Reply:
    """Returns the device's reply to a task."""
    return unpack_reply(trainer(pack_task(task), lambda: True), 1 << 30)
