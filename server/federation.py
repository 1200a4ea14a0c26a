"""What stays the same from round to round: the clients, and how they are asked."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from corolla import combinations, factors, robust, schedule, seeds, strategies
from corolla.aggregation import summable
from corolla.config import RunConfig
from corolla.errors import ConfigError
from corolla.packet import Packet
from corolla.server import clock, cohort
from corolla.server.gate import Expected
from corolla.types import LoraSpec, Params, Size, Strategy, Summable
from corolla.wire import Kind

Held = Mapping[str, frozenset[str]]
"""Member → content ids of the cached groups it is known to hold."""


class Network(Protocol):
    """Who can be asked: clients in this process, or behind a Flower Grid.

    Of what is said here of `online` and `seats`, a network that does not know better inherits
    that all are there and none is a gateway.
    """

    def clients(self) -> Mapping[str, int]:
        """Reachable members and their numbers of training examples."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterable[tuple[str, Packet | None]]:
        """Send each member its packet; yield (member, reply) in any order, None for no answer."""

    def online(self) -> AbstractSet[str]:
        """The members that can be asked now."""
        return self.clients().keys()

    def seats(self) -> Mapping[str, int]:
        """The gateways, and how many devices each can ask at a time, at least 1."""
        return {}


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round.

    Its members are clients and gateways. A gateway has seats: so many devices ("phones") it can ask
    at a time, named `<gateway>/…`, all of the class and rank of their gateway. Raises ConfigError
    for settings that gateways do not go with, and for names that could be taken for a phone's.
    """

    run_id: str
    config: RunConfig
    strategy: Strategy
    clients: Mapping[str, int]
    """Member → training examples; of a gateway the number says nothing."""
    fresh: Callable[[LoraSpec], Params]
    """A fresh adapter of a rank: its names and shapes decide which replies are valid."""
    origin: str = ""
    """The version of the first state, where the strategy keeps a log (seedlog.origin)."""
    trace: cohort.Trace | None = None
    """When members can be reached; None: always."""
    seats: Mapping[str, int] = field(default_factory=dict)
    """Gateway → seats; who is not in it is a client."""
    roster: Sequence[str] = ()
    """The members in the order in which they came: class and rank follow from the place, also when
    others come later. Empty: in the order of their names."""
    own_devices: bool = False
    """Clients are devices with settings of their own: the server's folders and machine settings
    stay with it."""
    model_sha256: str = ""
    """The base model that clients must have; empty: not checked."""
    labels: Sequence[str] = ()
    """Of a classification task, for devices that know their own rows only."""

    def __post_init__(self) -> None:
        if self.seats:
            combinations.refuse_gateways(self.config, self.strategy)
        for gateway in self.seats.keys() & self.clients.keys():
            taken = [name for name in self.clients if name.startswith(f"{gateway}/")]
            if taken:
                raise ConfigError(
                    f"client {taken[0]!r} has a name that belongs to a device of gateway "
                    f"{gateway!r}: rename one of the two"
                )

    @property
    def population(self) -> int:
        """How many clients can take part at a time."""
        return sum(map(self.room, self.clients))

    @property
    def cohort_size(self) -> int:
        """Clients per round, phones included."""
        return min(self.config.cohort or 8, self.population)

    @property
    def needed(self) -> int:
        """Updates without which a round of a full cohort is abandoned."""
        return self.quorum(self.cohort_size)

    def quorum(self, asked: int) -> int:
        """Of so many updates that are asked for, how many must be valid, by the config alone."""
        return math.ceil(self.config.quorum * asked)

    def room(self, member: str) -> int:
        """How many clients a member is: 1, or the seats of a gateway."""
        return self.seats.get(member, 1)

    @cached_property
    def partial(self) -> Summable | None:
        """An empty aggregator of which gateways send the sums; None: they send bundles."""
        return merges(self.config, self.strategy)

    def lora(self, client: str) -> LoraSpec:
        """Rank and scaling of one client's adapter."""
        return self.config.client_lora(self._index[client])

    def class_of(self, client: str) -> str:
        """The name of one client's class; "" without classes."""
        return self.config.class_of(self._index[client])

    def size(self, client: str, round: int = 1, phone: str = "") -> Size:
        """What decides the form of one client's update, or that of a phone of a gateway."""
        own = self.config.of_class(self.class_of(client))
        steps = schedule.steps_per_round(own, self.clients[client])
        adapter = factors.size(self.fresh(self.lora(client)))
        trainer = self.config.trainer_of(self.class_of(client))
        return replace(
            adapter,
            scalars=steps * own.queries,
            trainer=trainer,
            seed=seeds.derive(self.config.seed, "client", phone or client, round),
            round=round,
            step=schedule.step_size(own, round, self.clients[client]),
        )

    def most_examples(self, client: str) -> int:
        """The most examples a client, or a phone, can have used: a claim is its update's weight."""
        own = self.config.of_class(self.class_of(client))
        if own.local_epochs is not None:
            return self.clients[client]
        most = own.local_steps * own.batch_size
        return most if client in self.seats else min(self.clients[client], most)

    def expected(self, member: str, kind: Kind, round: int, seats: int = 1) -> Expected:
        """What a valid reply of a member to a task is like; `seats` is of a gateway's task."""
        if kind != Kind.TRAIN:
            return Expected(None)
        traits = strategies.traits(self.strategy)

        def one(phone: str = "") -> Expected:
            like = self.strategy.update_like(
                self.fresh(self.lora(member)), self.size(member, round, phone)
            )
            return Expected(
                like,
                self.config.uplink,
                self.most_examples(member),
                self.config.max_norm,
                space=robust.space_of(traits),
            )

        if member not in self.seats:
            return one()
        expected = replace(one(), most_clients=seats, member=one)
        if self.partial is None or expected.like is None:
            return expected
        return replace(expected, sums=self.partial.sums_like(expected.like))

    def present(self, round: int, online: AbstractSet[str] | None = None) -> list[str]:
        """The members that can be reached in a round; `online` can be asked now (None: all)."""
        there = self.trace.present(self.clients, round) if self.trace else list(self.clients)
        return there if online is None else [member for member in there if member in online]

    def sample(
        self, members: Sequence[str], size: int, round: int, draw: int = 0
    ) -> dict[str, int]:
        """Who is asked of `members`, for how many updates each: the config's way to select.

        Every seat is drawn like a client of its own (see cohort.sample). In the order in which
        updates are folded: that of the names of clients and phones.
        """
        weights = self.clients if self.config.selection == "weighted" else None
        seats = [member for member in members for _ in range(self.room(member))]
        drawn = cohort.sample(seats, size, self.config.seed, round, weights, draw)
        return {member: drawn.count(member) for member in sorted(set(drawn), key=self.place)}

    def place(self, member: str) -> str:
        """Members sorted by this are in the order of the names of their clients and phones."""
        return f"{member}/" if member in self.seats else member

    def seconds(self, client: str, down: int, up: int) -> float:
        """Simulated seconds of one client's task (see clock.seconds)."""
        name = self.class_of(client)
        steps = schedule.steps_per_round(self.config.of_class(name), self.clients[client])
        return clock.seconds(self.config, name, steps, down, up)

    @cached_property
    def evaluated(self) -> list[str]:
        """The clients on whose own examples a model is measured, the same throughout a run.

        Of a personal strategy, or with eval_participants, those that will train: of a personal
        one the others have nothing of their own. Gateways have no examples. Nobody with
        differential privacy: no noise covers what they would measure.
        """
        if self.config.dp != "none":
            return []
        able = set(self.clients)
        if self.config.eval_participants or strategies.traits(self.strategy).personal:
            rounds = range(1, self.config.rounds + 1)
            able = {c for r in rounds for c in self.sample(self.present(r), self.cohort_size, r)}
        able -= self.seats.keys()
        size = min(self.config.eval_clients, len(able))
        return cohort.sample(sorted(able), size, self.config.seed, -1)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {client: i for i, client in enumerate(self.roster or sorted(self.clients))}


def merges(config: RunConfig, strategy: Strategy) -> Summable | None:
    """An empty aggregator whose sums a gateway may send; None: every update must be seen."""
    seen = config.robust != "none" or config.dp == "client"
    return None if seen else summable(strategy.aggregator())
