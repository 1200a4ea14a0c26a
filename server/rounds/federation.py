"""The clients of a run and how they are asked, which stays the same from round to round."""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property

from corolla import seeds
from corolla.aggregation.sums import summable
from corolla.config import rules, schedule
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, ModelError
from corolla.interfaces import Choosing, Strategy, Summable
from corolla.models import layers
from corolla.server.rounds import cohort, simulated_time
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import LoraSpec, Params, Payload, Size, TrainerName

Held = Mapping[str, frozenset[str]]
"""Member → content ids of the cached groups it is known to hold."""


@dataclass(frozen=True)
class Federation:
    """The members of a run and how they are asked, which stays the same from round to round.

    Its members are clients and gateways. A gateway has seats: so many devices ("phones") it can ask
    at a time, named `<gateway>/…`, all of the rank of their gateway and of one of the classes
    `classes_behind` it. Raises ConfigError for settings that gateways do not go with, and for names
    that could be taken for a phone's.
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
    chosen: Sequence[str] = ()
    """The units that clients train in the round that goes on, of a strategy that is Choosing."""

    def __post_init__(self) -> None:
        if self.seats:
            rules.refuse_gateways(self.config, self.strategy)
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
        """Returns how many of the updates that are asked for must be valid, by the config alone."""
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

    def classes_of(self, member: str) -> Sequence[str]:
        """The classes that updates of a member can be of: its own first."""
        own = self.class_of(member)
        return [*classes_behind(self.config, own).values()] if member in self.seats else [own]

    def size(self, client: str, round: int = 1, phone: str = "", kind: str | None = None) -> Size:
        """Returns the Size that decides the form of the update of a client or a gateway's phone.

        `kind` is the class of the phone, where it is not that of its gateway.
        """
        name = self.class_of(client) if kind is None else kind
        own = self.config.of_class(name)
        steps = schedule.steps_per_round(own, self.clients[client])
        fresh = self.fresh(self.lora(client))
        return replace(
            factors.size(fresh),
            part=self._part(fresh, name) if self.config.partial else None,
            scalars=steps * own.queries,
            trainer=self.config.trainer_of(name),
            seed=seeds.derive(self.config.seed, "client", phone or client, round),
            round=round,
            step=schedule.step_size(own, round, self.clients[client]),
            chosen=self.chosen,
        )

    def at(self, state: Payload) -> "Federation":
        """The federation in a round that begins from `state`. Raises ConfigError as `chosen`."""
        if not isinstance(self.strategy, Choosing):
            return self
        return replace(self, chosen=tuple(self.strategy.chosen(state)))

    def _part(self, fresh: Params, name: str) -> Size:
        """The size of what clients of a class train. Raises ConfigError for unknown blocks."""
        try:
            names = layers.trained(fresh, self.config.of_class(name).layers)
        except ModelError as error:
            raise ConfigError(f"classes.{name}.{error}") from error
        return factors.size({n: fresh[n] for n in names})

    def present(self, round: int, online: AbstractSet[str] | None = None) -> list[str]:
        """The members that can be reached in a round; `online` can be asked now (None: all)."""
        there = self.trace.present(self.clients, round) if self.trace else list(self.clients)
        return there if online is None else [member for member in there if member in online]

    def sample(
        self, members: Sequence[str], size: int, round: int, draw: int = 0
    ) -> dict[str, int]:
        """Draws those of `members` to ask, for how many updates each: the config's way to select.

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
        """Simulated seconds of one client's task (see simulated_time.seconds)."""
        name = self.class_of(client)
        steps = schedule.steps_per_round(self.config.of_class(name), self.clients[client])
        return simulated_time.seconds(self.config, name, steps, down, up)

    @cached_property
    def evaluated(self) -> list[str]:
        """The clients on whose own examples a model is measured, the same throughout a run.

        Of a personal strategy, or with eval_participants, those that will train: of a personal
        one the others have nothing of their own. Gateways have no examples. Nobody with
        differential privacy, which covers not what they would measure, or with secure sums.
        """
        if self.config.dp != "none" or self.config.secure_sum:
            return []
        able = set(self.clients)
        if self.config.eval_participants or registry.traits(self.strategy).personal:
            rounds = range(1, self.config.rounds + 1)
            able = {c for r in rounds for c in self.sample(self.present(r), self.cohort_size, r)}
        able -= self.seats.keys()
        size = min(self.config.eval_clients, len(able))
        return cohort.sample(sorted(able), size, self.config.seed, -1)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {client: i for i, client in enumerate(self.roster or sorted(self.clients))}


def classes_behind(config: RunConfig, own: str) -> Mapping[TrainerName, str]:
    """Trainer → the class of a gateway's phones that train in this way; `own` is the gateway's.

    Its phones are of its own class, but for native ones that cannot train as that class does: they
    are of the first class of the same rank, scaling and blocks that trains as they can.
    """

    def adapter(name: str) -> tuple[int, float, str | None]:
        changed = config.classes[name]
        return changed.rank or config.rank, changed.alpha or config.alpha, changed.layers

    found = {config.trainer_of(own): own}
    for name in config.classes if own else ():
        if adapter(name) == adapter(own):
            found.setdefault(config.trainer_of(name), name)
    return found


def merges(config: RunConfig, strategy: Strategy) -> Summable | None:
    """An empty aggregator whose sums a gateway may send; None: every update must be seen."""
    seen = config.robust != "none" or config.dp == "client"
    return None if seen else summable(strategy.aggregator())
