"""What stays the same from round to round: the clients, and how they are asked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from corolla import factors, schedule, seeds, strategies
from corolla.config import RunConfig
from corolla.server import clock, cohort
from corolla.types import LoraSpec, Params, Size, Strategy
from corolla.wire import Packet

Held = Mapping[str, frozenset[str]]
"""Client → content ids of the cached groups it is known to hold."""


class Network(Protocol):
    """Who can be asked: clients in this process, or behind a Flower Grid."""

    def clients(self) -> Mapping[str, int]:
        """Reachable clients and their numbers of training examples."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterable[tuple[str, Packet | None]]:
        """Send each client its packet; yield (client, reply) in any order, None for no answer."""


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round."""

    run_id: str
    config: RunConfig
    strategy: Strategy
    clients: Mapping[str, int]
    fresh: Callable[[LoraSpec], Params]
    """A fresh adapter of a rank: its names and shapes decide which replies are valid."""
    origin: str = ""
    """The version of the first state, where the strategy keeps a log (seedlog.origin)."""
    trace: cohort.Trace | None = None
    """When clients can be reached; None: always."""

    @property
    def cohort_size(self) -> int:
        """Clients per round."""
        return min(self.config.cohort or 8, len(self.clients))

    def lora(self, client: str) -> LoraSpec:
        """Rank and scaling of one client's adapter."""
        return self.config.client_lora(self._index[client])

    def class_of(self, client: str) -> str:
        """The name of one client's class; "" without classes."""
        return self.config.class_of(self._index[client])

    def size(self, client: str, round: int = 1) -> Size:
        """What decides the form of one client's update."""
        own = self.config.of_class(self.class_of(client))
        steps = schedule.steps_per_round(own, self.clients[client])
        adapter = factors.size(self.fresh(self.lora(client)))
        trainer = self.config.trainer_of(self.class_of(client))
        return replace(
            adapter,
            scalars=steps * own.queries,
            trainer=trainer,
            seed=seeds.derive(self.config.seed, "client", client, round),
            round=round,
            step=schedule.step_size(own, round, self.clients[client]),
        )

    def most_examples(self, client: str) -> int:
        """The most examples a client can have used: a claim is the weight of its update."""
        own = self.config.of_class(self.class_of(client))
        if own.local_epochs is not None:
            return self.clients[client]
        return min(self.clients[client], own.local_steps * own.batch_size)

    def present(self, round: int) -> list[str]:
        """The clients that can be reached in a round."""
        return self.trace.present(self.clients, round) if self.trace else list(self.clients)

    def sample(self, clients: Sequence[str], size: int, round: int, draw: int = 0) -> list[str]:
        """A cohort of `clients`, as the config selects (see cohort.sample)."""
        weights = self.clients if self.config.selection == "weighted" else None
        return cohort.sample(clients, size, self.config.seed, round, weights, draw)

    def seconds(self, client: str, down: int, up: int) -> float:
        """Simulated seconds of one client's task (see clock.seconds)."""
        name = self.class_of(client)
        steps = schedule.steps_per_round(self.config.of_class(name), self.clients[client])
        return clock.seconds(self.config, name, steps, down, up)

    @cached_property
    def evaluated(self) -> list[str]:
        """The clients on whose own examples a model is measured, the same throughout a run.

        Of a personal strategy, or with eval_participants, those that will train: of a personal
        one the others have nothing of their own.
        """
        able = set(self.clients)
        if self.config.eval_participants or strategies.traits(self.strategy).personal:
            rounds = range(1, self.config.rounds + 1)
            able = {c for r in rounds for c in self.sample(self.present(r), self.cohort_size, r)}
        size = min(self.config.eval_clients, len(able))
        return cohort.sample(sorted(able), size, self.config.seed, -1)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {client: i for i, client in enumerate(sorted(self.clients))}
