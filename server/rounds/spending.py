"""Limits of differential privacy on what a run asks of its clients, and the cost so far."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.example_level import ExampleLevel, example_level
from corolla.privacy.guarantee import NEIGHBOURS, Guarantee, Unit
from corolla.privacy.randomness import NOISE
from corolla.server.rounds.federation import Federation
from corolla.types import PER_USER, Metrics, Params, Payload

_MEASURED = "what clients measure, their losses"
_LOOKS = f"{_MEASURED}, numbers of examples, what is refused and why, simulated seconds, answers"

WITHHELD = {
    "example": _MEASURED,
    "client": f"{_LOOKS}; bytes are those planned",
    "poisson": f"{_LOOKS}, how many are asked and answer; clients and bytes are those planned",
}
"""dp, or poisson with dp=client → what no line of metrics tells: no noise covers it."""


@dataclass
class Spending:
    """The account of a run, over all its processes. Without dp everything is allowed.

    `level` is that of dp=client. With dp=example each client keeps its own account, on its disk:
    here is what they say, and how often the server has asked each.
    """

    config: RunConfig
    level: ClientLevel | None = None
    asked: Counter[str] = field(default_factory=Counter)
    most: float = 0.0
    """The largest epsilon that a client has told."""
    who: set[str] = field(default_factory=set)
    """The clients that have told one."""
    users: set[str] = field(default_factory=set)
    """Clients whose rows named users; gateways of which some phone's did."""
    unnamed: set[str] = field(default_factory=set)
    """Clients whose rows named no users; gateways of which some phone's did not."""
    expected: Unit = "example"
    """The unit that is protected as far as is known before a client has told."""
    levels: dict[str, ExampleLevel] = field(default_factory=dict)
    """Client → the noise on its gradients, with dp=example, once it was worked out."""

    @property
    def poisson(self) -> bool:
        """True where a cohort is drawn from all clients by secret chance: it may be empty."""
        return self.level is not None and self.config.dp_sampling == "poisson"

    @property
    def withheld(self) -> str:
        """The facts that no line of metrics, no report and no warning tells; "" without dp."""
        return WITHHELD.get("poisson" if self.poisson else self.config.dp, "")

    @property
    def probability(self) -> float | None:
        """Of each client, to be in a cohort, where secret chance decides."""
        return self.level.sampling_probability if self.level and self.poisson else None

    def able(self, federation: Federation, members: Iterable[str], round: int) -> list[str]:
        """Those of `members` that may be asked in a round. Devices of a gateway are not known."""
        if self.level:
            return self.level.able(members, round)
        most = self.config.participations
        return [m for m in members if not most or m in federation.seats or self.asked[m] < most]

    def draw(
        self, federation: Federation, present: Iterable[str], round: int, draw: int
    ) -> dict[str, int]:
        """A cohort: member → how many updates to ask it for; of Poisson sampling also who is away.

        Drawn of those that are present from the run's seed, or of all by secret chance.
        """
        if self.level and self.poisson:
            return dict.fromkeys(sorted(self.level.draw(sorted(federation.clients))), 1)
        size = federation.cohort_size
        size = min(size, self.level.cohort) if self.level else size
        return federation.sample(self.able(federation, present, round), size, round, draw)

    def refusal(self, client: str, round: int) -> str:
        """Why what a client sent may not be folded in; "" if it may."""
        return self.level.refusal(client, round) if self.level else ""

    @property
    def unit(self) -> Unit:
        """The unit that is protected as a whole, as the clients say that have told."""
        if self.level or not self.who:
            return "client" if self.level else self.expected
        if not self.users:
            return "example"
        return "example or user" if self.unnamed else "user"

    def hear(self, metrics: Mapping[str, Metrics]) -> Mapping[str, Any]:
        """Hears the epsilon that clients have spent on their examples; returns facts to note."""
        told = {client: own for client, own in metrics.items() if "epsilon" in own}
        self.who |= told.keys()
        self.most = max([self.most, *(own["epsilon"] for own in told.values())])
        shares = {client: own.get(PER_USER, 0.0) for client, own in told.items()}
        users = {client for client, share in shares.items() if share > 0}
        unnamed = {client for client, share in shares.items() if share < 1}
        self.users |= users
        self.unnamed |= unnamed
        unit, found = self.unit, sorted(told)
        note: dict[str, Any] = {"unit": unit, "epsilon": self.most, "clients": found}
        if self.users:
            named = {"users": sorted(users), "unnamed": sorted(unnamed)}
            note |= {"neighbours": NEIGHBOURS[unit], **named}
        return note

    def gradient_norms(self, federation: Federation, updates: int) -> Metrics:
        """With dp=example the norms of a round's noise and of its mean update, in gradients.

        The noise is the least that there may be in the mean of so many updates: that of the
        largest client. `update_norm` is the most that clipped gradients add up to. Neither is
        measured on data. Empty where nobody here knows how many examples clients have.
        """
        sizes = {n: c for c, n in federation.clients.items() if c not in federation.seats}
        # What devices of others say that they have makes the server calibrate nothing.
        guessed = federation.own_devices and self.config.noise_multiplier is None
        if self.config.dp != "example" or not sizes or not updates or guessed:
            return {}
        member = sizes[max(sizes)]
        own = self.config.of_class(federation.class_of(member))
        try:
            level = self.levels.get(member) or example_level(own, max(sizes))
        except ConfigError:  # a delta that is none for so many examples: the device refuses
            return {}
        self.levels[member] = level
        size, fresh = federation.size(member), federation.fresh(federation.lora(member))
        values = own.queries
        if size.trainer == "first_order":  # what is trained and sent: some send more, as scaffold
            sent = federation.strategy.update_like(fresh, size).values()
            values = min(_values(fresh), sum(map(_values, sent)))
        noise = level.noise_norm(values) / math.sqrt(updates)
        return {"noise_norm": noise, "update_norm": level.gradient_bound}

    def ended(self, federation: Federation, round: int) -> str:
        """Why a round may not be: its cost, or too few who may still take part; "" if it may.

        Devices that separation bars for a while come back when others have joined.
        """
        config = self.config
        if self.level and config.epsilon is not None:
            after = self.level.next_epsilon(round)
            if after > config.epsilon:
                return (
                    f"privacy budget: with round {round}, epsilon would be {after:.4g} of "
                    f"{config.epsilon:g}"
                )
        needed = federation.quorum(min(federation.cohort_size, federation.population))

        def able(at: int) -> int:
            return sum(map(federation.room, self.able(federation, federation.clients, at)))

        now = able(round)
        if now >= min(needed, federation.population):
            return ""
        barred = able(round + config.separation) >= needed
        if barred and federation.own_devices:
            return ""
        return (
            f"{'separation' if barred else 'participations'}: {now} clients may still take part in "
            f"round {round}, {needed} are needed"
        )

    def forgotten(self, memory: Payload) -> Payload:
        """A server's memory without what takes noise off: of no use when no round is to come."""
        return {group: own for group, own in memory.items() if not group.startswith(NOISE)}

    def guarantee(self) -> Guarantee | None:
        """Returns the Guarantee as spent so far; None without differential privacy."""
        if self.level:
            return self.level.guarantee()
        if self.config.dp == "none":
            return None
        drawn = {"example": "examples", "user": "users"}.get(self.unit, "examples or users")
        how = f"Poisson sampling of {drawn}; the most that one of {len(self.who)} clients says"
        return Guarantee(self.unit, self.most, self.config.delta, self.config.epsilon, how)

    def to_json(self) -> dict[str, Any] | None:
        """For run.json: the guarantee, in a line too, and the mechanism behind it."""
        guarantee, config = self.guarantee(), self.config
        if guarantee is None:
            return None
        return {
            **guarantee.to_json(),
            "line": guarantee.line(),
            "noise_multiplier": (self.level or config).noise_multiplier,
            "clip": config.clip,
            "mechanism": config.dp_mechanism,
            "withheld": self.withheld,
        }


def _values(params: Params) -> int:
    return sum(tensor.numel() for tensor in params.values())
