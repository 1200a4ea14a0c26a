"""How a round is defended against hostile clients."""

from typing import Literal

from corolla.aggregation import robust
from corolla.aggregation.robust import Rule, Space
from corolla.config.section import Positive, key
from corolla.config.subject import Subject
from corolla.interfaces import Strategy
from corolla.strategies import registry


class Defence(Subject):
    """A rule of robust aggregation."""

    robust: Literal["none", Rule] = key(
        "none",
        "The rule that defends the aggregate against hostile clients.",
        "trimmed_mean",
        against=(
            "cohort=2",
            "strategy=flora",
            "strategy=scaffold optimizer=sgd",
            "dp=client epsilon=8",
        ),
    )
    byzantine: Positive | None = key(
        None,
        "The number of clients of a cohort that may be hostile.",
        2,
        effect="a fifth of the cohort, at least 1",
        beside="robust=trimmed_mean",
        against=("robust=median", "cohort=4"),
    )
    robust_space: Literal["auto", Space] = key(
        "auto",
        "Where updates are compared: tensor by tensor, or by the products of their factors.",
        "tensors",
        effect="products where these are added up, else tensors",
        beside="robust=krum",
        against=("strategy=flora",),
    )

    def compared_in(self, strategy: Strategy) -> Space:
        """The space of the rule that `robust` names."""
        own = robust.space_of(registry.traits(strategy))
        return own if self.robust_space == "auto" else self.robust_space
