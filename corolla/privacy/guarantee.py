"""The guarantee of a private run: (epsilon, delta), for which unit, after how many rounds."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from corolla.config.run import RunConfig


Unit = Literal["example", "user", "example or user", "client"]
"""The unit that is protected as a whole; some clients can have rows that name users, others not."""

NEIGHBOURS: dict[Unit, str] = {
    "example": "add or remove one example",
    "user": "add or remove one user of a client, with all rows",
    "example or user": (
        "add or remove one example, or one user of a client with all rows where these name users"
    ),
    "client": "add or remove one client's updates",
}
"""Unit → what two data sets differ in, at most, that nobody can tell apart.

A client's place in the cohorts stays: with another one in its stead, two updates would differ.
"""


@dataclass(frozen=True)
class Guarantee:
    """The promise to each example, user or client, in the terms that decide its meaning."""

    unit: Unit
    epsilon: float
    delta: float
    budget: float | None
    """The most that epsilon may become in the run; None: the noise was given, epsilon follows."""
    how: str
    """The basis of the accounting: how participants are drawn, how often one takes part."""

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
    """Returns the guarantee of a client-level run, once its releases have cost epsilon `spent`.

    A client takes part in at most `times` rounds, or with chance `q` in each.
    """
    if config.dp_sampling == "poisson":
        how = f"Poisson sampling of clients, q = {q:.4g}"
    else:
        how = f"no amplification, each client in at most {times} round{'s' * (times != 1)}"
        if config.dp_mechanism == "banded":
            how += f", noise correlated over {config.separation} rounds"
    return Guarantee("client", spent, config.delta, config.epsilon, how)
