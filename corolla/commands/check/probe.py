"""A strategy on a tiny model: real rounds (wire format, gate, aggregator, trainer) in this process.

What a client trained is read from its model by peft's factors and scaling, never from what it sent.
A composition root: it brings server and client together.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.commands.check import tiny_models
from corolla.commands.check.tables import BATCH, CLIENTS, ROUNDS, STEPS
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.directions import moving, seedlog
from corolla.interfaces import Observed
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.models.sparse_model import SparseModel
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.starts import table as starts
from corolla.starts.table import Started
from corolla.storage.memory import Memory
from corolla.strategies import offset
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import Params, Payload
from corolla.wire import messages
from corolla.wire.messages import unpack_reply
from corolla.wire.packet import Packet

Resident = LoraModel | SparseModel

MOST_BYTES = 1 << 40
"""Bound on the bytes of a reply that is unpacked: none, for the strategy is not hostile here."""
STILL = 1e-12
"""A learning rate with which training ends where it starts."""
_SIZE = tiny_models.Size()
_LABELS = ("no", "perhaps", "yes")


@dataclass(frozen=True)
class Round:
    """A round that has been run. `state`, `held` and `kept` are as they were before it."""

    number: int
    state: Payload
    held: Held
    kept: Path
    """A copy of what devices kept."""
    result: RoundResult
    observed: Observed
    deltas: Mapping[str, Params]
    """Client → what its model added to the base weights after training."""
    sent: Mapping[str, Packet]
    left: Mapping[str, Payload]
    """Client → what it keeps of this round for itself."""


class Probe:
    """A strategy on a tiny model, with a federation of CLIENTS whose devices keep in `folder`.

    `changes` are other keys of the run.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        folder: Path,
        options: Mapping[str, object] | None = None,
        changes: Mapping[str, object] | None = None,
    ) -> None:
        self.name, self.kind, self.folder = name, kind, folder
        self.options = dict(options or {})
        self.config = settings(name, kind, self.options, changes=changes)
        self.labels = list(_LABELS) if kind == "bert" else []
        self.data = _data(self.labels)
        self.strategy = build_strategy(self.config)
        self.begun: Started | None = None
        self.network = self.network_on(folder / "a")
        self.model = self.network.model
        self.federation = self._federation()

    def network_on(
        self, folder: Path, model: Resident | None = None, config: RunConfig | None = None
    ) -> "Recorder":
        """The same clients, with what devices keep in `folder`, on this model or one of their own.

        With other settings where they are given.
        """
        folder.mkdir(exist_ok=True)
        lora_model = model or self._model()
        worker = Worker(config or self.config, lora_model, self.data, Memory(folder))
        return Recorder(worker, lora_model, self.added)

    def rounds(self, number: int) -> Iterator[Round]:
        """Run rounds from a fresh state, each when it is asked for, of the cohorts of ROUNDS."""
        state: Payload = self.fresh()
        held: Held = {}
        for round in range(1, number + 1):
            kept = self.folder / f"kept-{round}"
            shutil.copytree(self.network.worker.memory.folder, kept)
            members = dict.fromkeys(ROUNDS[(round - 1) % len(ROUNDS)], 1)
            call = RoundCall(self.federation, state, held, round, cohort=members)
            result = run_round(call, self.network)
            seen = self._observed(state, result)
            deltas = {client: self.network.deltas[client] for client in result.num_examples}
            sent, left = dict(self.network.sent), self._left(round)
            yield Round(round, state, held, kept, result, seen, deltas, sent, left)
            state, held = result.state, result.held

    def fresh(self) -> Payload:
        """A state before any round."""
        fresh = self.model.init(self.config.lora, seeds.derive(0, "init"))
        if self.config.start == "random":
            return self.strategy.init(fresh, 0)
        self.begun = self.begun or starts.begin(self.model, fresh, self.config, self.labels)
        return self.begun.state(self.strategy, 0)

    def deltas(self, state: Payload) -> Params:
        """Returns the tensor that a state adds to each weight of the base model."""
        self.model.show(self.strategy.adapter(state), self.config.lora)
        return self.added(self.model)

    def added(self, model: Resident) -> Params:
        """Returns the tensor that a model adds to each weight of the base and its block, if any."""
        found, block = model.deltas(), self.begun and self.begun.block
        if not block or not isinstance(model, LoraModel):
            return found
        return {
            n: t - factors.product(block, n) if n in model.shapes else t for n, t in found.items()
        }

    def _left(self, round: int) -> dict[str, Payload]:
        if not registry.traits(self.strategy).keeps:
            return {}
        memory = self.network.worker.memory
        return {client: memory.kept(client, round, commit=False) for client in self.network.sent}

    def _model(self) -> Resident:
        labels = len(self.labels)
        model = tiny_models.build(self.kind, _SIZE, labels, seed=0).requires_grad_(False)
        tokenizer = tiny_models.word_tokenizer(_SIZE.vocabulary)
        task = "classify" if labels else "causal"
        return self._resident(Base(model, tokenizer, task, self.kind, self.kind))

    def _resident(self, base: Base) -> Resident:
        """A resident model in which an adapter is trained."""
        return LoraModel(base)

    def _federation(self) -> Federation:
        config, model = self.config, self.model
        clients = {client: len(split.train) for client, split in self.data.clients.items()}
        start = model.init(config.lora, seeds.derive(config.seed, "init"))
        origin = seedlog.origin(model.base.fingerprint, self.strategy.init(start, config.seed))
        fresh = cache(lambda spec: model.init(spec, 0))
        return Federation("0" * 32, config, self.strategy, clients, fresh, origin)

    def _observed(self, state: Payload, result: RoundResult) -> Observed:
        """A round as it happened. `start` is the global adapter in one set of tensors."""
        bare = {group: own for group, own in state.items() if group != offset.GROUP}
        spec, adapter = self.config.lora, self.strategy.adapter(bare)
        trained = {c: self.network.trained[c] for c in result.num_examples}
        start = {**self.model.init(spec, 0), **adapter.trained}
        if adapter.moves:
            start |= moving.settle(adapter.trained, adapter.moves)
        if adapter.frozen:
            start |= factors.bake(adapter.frozen[0], 1 / spec.scaling)
        loras = {client: self.federation.lora(client) for client in trained}
        sent = {client: update(self.network.sent[client]) for client in trained}
        return Observed(spec, start, trained, shares(result.num_examples), loras, state, sent)


class Recorder(Network):
    """A network of clients in this process that remembers what each model was after training."""

    def __init__(
        self, worker: Worker, model: Resident, added: Callable[[Resident], Params]
    ) -> None:
        self.worker, self.model, self.reverse = worker, model, False
        self.added = added
        self.deltas: dict[str, Params] = {}
        self.trained: dict[str, Params] = {}
        self.sent: dict[str, Packet] = {}

    def clients(self) -> Mapping[str, int]:
        return dict(CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.sent = {}
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client, packets[client])
            if not unpack_reply(answer, MOST_BYTES).error:
                self.deltas[client] = self.added(self.model)
                self.trained[client] = self.model.read()
            self.sent[client] = answer
            yield client, answer


def update(packet: Packet) -> Payload:
    """Returns the payload that the packet of a client's reply carries."""
    return messages.content(unpack_reply(packet, MOST_BYTES))


def shares(examples: Mapping[str, float]) -> dict[str, float]:
    """Client → its part of all examples."""
    total = sum(examples.values())
    return {client: n / total for client, n in examples.items()}


def settings(
    name: str,
    kind: str,
    options: Mapping[str, object],
    lr: float | None = None,
    changes: Mapping[str, object] | None = None,
) -> RunConfig:
    """Returns a run's settings, with mixed ranks and trainers where the strategy allows."""
    cls = registry.find(name)
    optimizer = registry.traits(cls).optimizers[0]
    lr = lr or (0.3 if optimizer == "sgd" else 1e-2)
    spec: dict[str, Any] = {"rank": 4, "alpha": 8.0, "rslora": kind == "gpt2"}
    if cls.mixed_ranks:
        spec |= {"ranks": [4, 8, 16], "alphas": [8.0, 4.0, 64.0]}
    if len(cls.trainers) > 1:
        of_class = 1e-2 if lr > STILL else lr
        spec["classes"] = {
            trainer: {"trainer": trainer, "lr": of_class} for trainer in cls.trainers
        }
    return RunConfig(
        strategy=name,
        options=dict(options),
        cohort=len(CLIENTS),
        rounds=10,
        optimizer=optimizer,
        lr=lr,
        local_steps=1 if lr == STILL else STEPS,
        batch_size=BATCH,
        **{**spec, **(changes or {})},
    )


def _data(labels: Sequence[str]) -> FederatedData:
    """Random words, different for each client, the same on every machine."""
    generator = seeds.generator(0, "conformance")
    clients = {}
    for index, (client, number) in enumerate(CLIENTS.items()):
        words = torch.randint(10 * index, 10 * index + 30, (number, 9), generator=generator)
        rows = [
            Example(" ".join(f"w{w}" for w in row), label=labels[row[0] % 3] if labels else None)
            for row in words.tolist()
        ]
        clients[client] = Split(rows, rows[:2])
    return FederatedData("conformance", clients, [], list(labels), "")
