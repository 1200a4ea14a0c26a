"""How a round is defended against hostile clients."""

from typing import Literal

from corolla.config.sections.section import Positive, key
from corolla.config.sections.subject import Subject
from corolla.types import RobustRule, Space


class Defence(Subject):
    """A rule of robust aggregation."""

    robust: Literal["none", RobustRule] = key(
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
