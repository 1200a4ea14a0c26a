"""What is promised: (epsilon, delta), for whom, after how many rounds."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from corolla.config.run import RunConfig


NEIGHBOURS = {
    "example": "add or remove one example",
    "client": "add or remove one client's updates",
}
"""Unit → what two data sets differ in, at most, that nobody can tell apart.

A client's place in the cohorts stays: with another one in its stead, two updates would differ.
"""


@dataclass(frozen=True)
class Guarantee:
    """What is promised to each example or client, in the terms that decide what it means."""

    unit: Literal["example", "client"]
    epsilon: float
    delta: float
    budget: float | None
    """What epsilon may become in this run; None: the noise was given, and epsilon follows."""
    how: str
    """What the accounting rests on: how participants are drawn, how often one takes part."""

    def line(self) -> str:
        """All of it in one line."""
        budget = "" if self.budget is None else f" of a budget of {self.budget:g}"
        return (
            f"epsilon {self.epsilon:.4g}{budget} at delta {self.delta:g}, to "
            f"{NEIGHBOURS[self.unit]}; {self.how}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; epsilon is None where it is infinite."""
        found = asdict(self)
        return found | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}


def client_guarantee(config: "RunConfig", spent: float, q: float, times: int) -> Guarantee:
    """What a client-level run promises once its releases have cost an epsilon of `spent`.

    A client takes part in at most `times` rounds, or with chance `q` in each.
    """
    if config.dp_sampling == "poisson":
        how = f"Poisson sampling of clients, q = {q:.4g}"
    else:
        how = f"no amplification, each client in at most {times} round{'s' * (times != 1)}"
        if config.dp_mechanism == "banded":
            how += f", noise correlated over {config.separation} rounds"
    return Guarantee("client", spent, config.delta, config.epsilon, how)
