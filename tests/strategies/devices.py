"""Federations of devices that each have a worker and a memory of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.models import pretrained
from corolla.models.full import FullModel
from corolla.models.lora import LoraModel
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, evaluate_clients, run_round
from corolla.storage.memory import Memory
from corolla.types import Payload
from corolla.wire.messages import Reply, Task, unpack_reply, unpack_task
from corolla.wire.packet import Packet
from tests.strategies import tiny


def build(config: RunConfig, kind: str) -> LoraModel | FullModel:
    """A resident model; always the same weights."""
    base = tiny.base(kind)
    return FullModel(base) if config.parameters == "full" else LoraModel(base)


@dataclass
class Devices(Network):
    """A network in which every client is a device; the rest is of the last time it was asked.

    Devices take turns with one resident model, as in a simulation; `weights` are those it held.
    """

    config: RunConfig
    kind: str
    folder: Path
    model: LoraModel | FullModel
    reverse: bool = False
    workers: dict[str, Worker] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    replies: dict[str, Reply] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def clients(self) -> Mapping[str, int]:
        return dict(tiny.CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client)(client, packets[client])
            self.tasks[client] = unpack_task(packets[client])
            self.replies[client] = unpack_reply(answer, 1 << 30)
            self.weights[client] = weights(self.model)
            self.hashes[client] = pretrained.fingerprint(self.model.model)
            yield client, answer

    def worker(self, client: str) -> Worker:
        if client not in self.workers:
            memory = Memory(self.folder / client)
            self.workers[client] = Worker(self.config, self.model, tiny.data(self.kind), memory)
        return self.workers[client]

    def restart(self, client: str) -> None:
        """Its memory stays on its disk."""
        del self.workers[client]


@dataclass
class Run:
    """A federation of devices and where it stands."""

    federation: Federation
    network: Devices
    state: Payload
    held: Held = field(default_factory=dict)
    round: int = 0

    @cached_property
    def _model(self) -> LoraModel | FullModel:
        return build(self.federation.config, self.network.kind)

    def step(self, *clients: str) -> RoundResult:
        """One round; all of `clients` (default: all there are) take part."""
        members = {client: tiny.CLIENTS[client] for client in clients or tiny.CLIENTS}
        config = self.federation.config.model_copy(update={"cohort": len(members)})
        own = replace(self.federation, clients=members, config=config)
        self.round += 1
        for last in (self.network.tasks, self.network.replies, self.network.weights):
            last.clear()
        result = run_round(RoundCall(own, self.state, self.held, self.round), self.network)
        assert result.dropped == {}
        self.state, self.held = result.state, result.held
        return result

    def hashes(self) -> dict[str, str]:
        """What each client's device has as the global model: a hash of all weights."""
        found = evaluate_clients(RoundCall(self.federation, self.state, self.held, 0), self.network)
        assert found.keys() == tiny.CLIENTS.keys()
        return dict(sorted(self.network.hashes.items()))

    def server(self) -> str:
        """The hash of the server's global model."""
        model = self.shown()
        return pretrained.fingerprint(model.model)

    def shown(self) -> LoraModel | FullModel:
        """The server's own model, with its weights."""
        model = self._model
        model.show(self.federation.strategy.adapter(self.state), self.federation.config.lora)
        return model


def start(kind: str, folder: Path, *, reverse: bool = False, **changes: Any) -> Run:
    """A federation before its first round; see tiny.config for `changes`."""
    config = tiny.config(**{"eps": 0.01, **changes})
    strategy = build_strategy(config)
    model = build(config, kind)
    first = strategy.init(model.init(config.lora, seeds.derive(config.seed, "init")), config.seed)
    origin = seedlog.origin(model.base.fingerprint, first)
    fresh = cache(lambda spec: model.init(spec, 0))
    federation = Federation("0" * 32, config, strategy, tiny.CLIENTS, fresh, origin)
    return Run(federation, Devices(config, kind, folder, model, reverse), first)


def weights(model: LoraModel | FullModel) -> dict[str, Tensor]:
    """All trained tensors of a model: those of its adapter, or all parameters."""
    if isinstance(model, LoraModel):
        return dict(model.read())
    return {n: p.detach().clone() for n, p in model.model.named_parameters()}
