"""The call of a round, the plan of members to ask, and the listeners that hear of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corolla.server.rounds.federation import Federation, Held
from corolla.types import Payload


@dataclass(frozen=True)
class Plan:
    """The members that are about to be asked: known before anything is sent."""

    round: int
    attempt: int
    cohort: Mapping[str, int]
    """Member → how many updates it is asked for; of Poisson sampling also who is away."""
    base_version: str
    seed: int


@dataclass(frozen=True)
class RoundCall:
    """The values that a round starts from."""

    federation: Federation
    state: Payload
    held: Held
    number: int
    """Of the round; the first one is 1."""
    memory: Payload = field(default_factory=dict)
    """Groups that the server remembers beside the strategy's state."""
    attempt: int = 0
    """Another attempt draws another cohort."""
    cohort: Mapping[str, int] | None = None
    """Member → updates to ask for: a cohort that was drawn before and is asked again."""
    last: bool = False
    """True where no attempt follows.

    A client that fails then in a secret cohort was as good as not drawn: the same cohort would be
    asked for ever.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "federation", self.federation.at(self.state))


@dataclass(frozen=True)
class RoundEvents:
    """Listeners that hear of a round while it goes on; by default there are none."""

    on_reply: Callable[[str], None] = lambda client: None
    """Hears which member has answered or is given up."""
    on_plan: Callable[[Plan], None] = lambda plan: None
    """Hears who will be asked before anything is sent."""
    note: Callable[[Mapping[str, Any]], None] = lambda event: None
    """Gets what a release costs before its noise is drawn."""
