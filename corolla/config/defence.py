"""How a round is defended against hostile clients."""

from typing import Literal

from pydantic import Field

from corolla.aggregation import robust
from corolla.aggregation.robust import Rule, Space
from corolla.config.section import Positive
from corolla.config.subject import Subject
from corolla.interfaces import Strategy
from corolla.strategies import registry


class Defence(Subject):
    """A rule of robust aggregation."""

    robust: Literal["none", Rule] = Field(
        "none", description="how updates are defended against hostile clients (see robust.py)"
    )
    byzantine: Positive | None = Field(
        None, description="how many of a cohort may be hostile; None: a fifth, at least 1"
    )
    robust_space: Literal["auto", Space] = Field(
        "auto", description="where updates are compared; auto: products where these are added up"
    )

    def compared_in(self, strategy: Strategy) -> Space:
        """The space of the rule that `robust` names."""
        own = robust.space_of(registry.traits(strategy))
        return own if self.robust_space == "auto" else self.robust_space
