"""A federation of four on a network that lies, drops and repeats; nobody trains here."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corolla import seeds
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.types import Params, Payload
from corolla.wire import codec
from corolla.wire.messages import Reply, pack_reply, unpack_task
from corolla.wire.packet import Packet

EXAMPLES = {"ada": 5, "ben": 3, "cyd": 7, "dot": 2}
HONEST = {"ada", "ben", "dot"}
FRESH: Params = {
    "m.lora_A": torch.zeros(2, 3),
    "m.lora_B": torch.zeros(4, 2),
    "bias": torch.zeros(4),
}
LENGTH = 0.5
"""The joint norm of an honest update is less."""

Fault = Callable[[Packet], Iterable[Packet | None]]
Array = NDArray[np.float64]


def tensor(client: str, round: int, name: str) -> Tensor:
    rng = seeds.generator(0, "update", client, round, name)
    return 0.1 * torch.rand(FRESH[name].shape, generator=rng) - 0.05


def update(strategy: str, client: str, round: int) -> Payload:
    """What an honest client sends: nobody trains here."""
    own = {name: tensor(client, round, name) for name in FRESH}
    if strategy == "fedavg":
        return {"adapter": own}
    return {"factors": {n: own[n] for n in own if n != "bias"}, "head": {"bias": own["bias"]}}


@dataclass
class Lying(Network):
    """Honest clients, some of whose answers go through a fault."""

    strategy: str
    faults: Mapping[str, Fault] = field(default_factory=dict)
    order: Sequence[str] = ()

    def clients(self) -> Mapping[str, int]:
        return EXAMPLES

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client in self.order or packets:
            task = unpack_task(packets[client])
            data = codec.encode(update(self.strategy, client, task.round))
            echo = (task.run_id, task.round, task.base_version, task.kind)
            metrics = {"train_loss": 1.0}
            honest = pack_reply(Reply(*echo, client, EXAMPLES[client], metrics, data))
            answers = self.faults[client](honest) if client in self.faults else [honest]
            for packet in answers:
                yield client, packet


@dataclass
class Server:
    """A run of one strategy, round after round."""

    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: Sequence[str] = ()
    """In which answers arrive."""

    def __post_init__(self) -> None:
        config = RunConfig(
            strategy=self.strategy, rank=2, cohort=4, local_steps=1, batch_size=8, **self.settings
        )
        made = build_strategy(config)
        self.federation = Federation("ab" * 16, config, made, EXAMPLES, lambda spec: FRESH)
        self.state = made.init(FRESH, 0)
        self.held: Mapping[str, frozenset[str]] = {}
        self.memory: Payload = {}
        self.round = 1

    def step(self, **faults: Fault) -> RoundResult:
        """The next round, which is committed."""
        network = Lying(self.strategy, faults, self.order)
        found = run_round(
            RoundCall(self.federation, self.state, self.held, self.round, memory=self.memory),
            network,
        )
        self.state, self.held, self.memory = found.state, found.held, found.memory
        self.round += 1
        return found

    def dense(self) -> list[Array]:
        """The global model: the matrices whose mean is taken, in fp64."""
        adapter = self.federation.strategy.adapter(self.state)
        if self.strategy == "fedavg":
            return [adapter.trained[name].double().numpy() for name in FRESH]
        blocks = [_product(block["m.lora_A"], block["m.lora_B"]) for block in adapter.frozen]
        return [sum(blocks, np.zeros((4, 3))), adapter.trained["bias"].double().numpy()]


def _product(a: Tensor, b: Tensor) -> Array:
    return np.asarray(b.double().numpy() @ a.double().numpy())


def mean(strategy: str, clients: Iterable[str], round: int = 1) -> list[Array]:
    """Σ w x / Σ w of the dense matrices of these clients' updates."""
    members = sorted(clients)
    total = sum(EXAMPLES[client] for client in members)

    def of(client: str) -> list[Array]:
        own = {name: tensor(client, round, name) for name in FRESH}
        if strategy == "fedavg":
            return [own[name].double().numpy() for name in FRESH]
        return [_product(own["m.lora_A"], own["m.lora_B"]), own["bias"].double().numpy()]

    parts = [[EXAMPLES[client] / total * x for x in of(client)] for client in members]
    return [np.sum(list(column), axis=0) for column in zip(*parts, strict=True)]


def same(found: Sequence[Array], wanted: Sequence[Array]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)
