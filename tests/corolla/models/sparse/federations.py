"""Federations on tiny models with a sparse set, and their weights read from the base model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.models.sparse import carried
from corolla.models.sparse_model import SparseModel
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.storage.memory import Memory
from corolla.types import LoraSpec, Params, Payload
from corolla.wire.messages import unpack_reply, unpack_task
from corolla.wire.packet import Packet
from tests.strategies import tiny

RANK = 2
SPEC = LoraSpec(RANK, 1.0)


def sparse(kind: str, rank: int = RANK, **options: Any) -> SparseModel:
    """A sparse set in all linear layers of a tiny model."""
    return SparseModel(tiny.base(kind), rank, **options)


def settings(strategy: str = "fedavg", **changes: Any) -> RunConfig:
    return tiny.config(strategy, **{"parameters": "sparse", "rank": RANK, **changes})


def moved(model: SparseModel, seed: int = 1) -> Params:
    """Trained tensors as after training: none is zero, or where it started."""
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=seeds.generator(seed, name))
        for name, tensor in model.init(SPEC, 0).items()
    }


def weights(model: SparseModel) -> dict[str, Tensor]:
    """All weights that the model computes with now, by the names of transformers, in fp32."""
    shown = {f"{name}.weight": model.base.model.get_submodule(name).weight for name in model.sizes}
    plain = {
        name: parameter
        for name, parameter in model.base.model.named_parameters()
        if ".parametrizations." not in name
    }
    return {name: tensor.detach().clone() for name, tensor in {**plain, **shown}.items()}


def scattered(kind: str, model: SparseModel, params: Params) -> dict[str, Tensor]:
    """The base's weights with changes added at the model's places, by plain indexing."""
    found = {n: p.detach().clone() for n, p in tiny.base(kind).model.named_parameters()}
    for name, at in model.places.items():
        found[f"{name}.weight"].view(-1)[at] += params[f"{name}.delta"]
    return found | {n: t.clone() for n, t in params.items() if not n.endswith(".delta")}


@dataclass
class Recorder(Network):
    """Clients in this process; remembers tasks, answers, and each model after training."""

    worker: Worker
    tasks: dict[str, Packet] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    trained: dict[str, Params] = field(default_factory=dict)
    weights: dict[str, Params] = field(default_factory=dict)

    def clients(self) -> Mapping[str, int]:
        return dict(tiny.CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for seen in (self.errors, self.examples, self.trained, self.weights):
            seen.clear()
        self.tasks = dict(packets)
        for client in sorted(packets):
            answer = self.worker(client, packets[client])
            reply = unpack_reply(answer, 1 << 30)
            self.errors[client], self.examples[client] = reply.error, reply.num_examples
            self.trained[client] = self.worker.model.read()
            assert isinstance(self.worker.model, SparseModel)
            self.weights[client] = weights(self.worker.model)
            yield client, answer

    def cached(self, client: str) -> dict[str, str]:
        """The groups that a client is told to hold."""
        return dict(unpack_task(self.tasks[client]).cached)


@dataclass
class Run:
    """A federation and where it stands."""

    federation: Federation
    network: Recorder
    model: SparseModel
    state: Payload
    held: Held = field(default_factory=dict)
    done: list[RoundResult] = field(default_factory=list)

    def step(self) -> RoundResult:
        """One round."""
        call = RoundCall(self.federation, self.state, self.held, len(self.done) + 1)
        result = run_round(call, self.network)
        self.state, self.held = result.state, result.held
        self.done.append(result)
        return result

    def show(self) -> None:
        """Shows the global model, at the places of the state."""
        carried.hold(self.model, self.state)
        adapter = self.federation.strategy.adapter(self.state)
        self.model.show(adapter, self.federation.config.lora)


def start(config: RunConfig, kind: str, folder: Path, support: Params | None = None) -> Run:
    """A federation before its first round, whose server sends these places, if any."""
    model = sparse(kind, config.rank, targets=config.target_modules, seed=config.seed)
    strategy = build_strategy(config)
    worker = Worker(config, model, tiny.data(kind), Memory(folder))
    first = strategy.init(model.init(config.lora, seeds.derive(config.seed, "init")), config.seed)
    origin = seedlog.origin(model.base.fingerprint, first)
    fresh = cache(lambda spec: model.init(spec, 0))
    federation = Federation("0" * 32, config, strategy, tiny.CLIENTS, fresh, origin)
    state = {**first, **({carried.GROUP: support} if support else {})}
    return Run(federation, Recorder(worker), model, state)
