"""The rows of what `corolla check` tries: clients, cohorts, weights, options.

Another case is another row. Models have their rows in tiny_models.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CLIENTS: Mapping[str, int] = {
    "ada": 5,
    "ben": 11,
    "cyd": 8,
    "dot": 3,
    "eve": 12,
    "fay": 1,
    "gus": 40,
}
"""Client → examples: unlike, from one to more than its steps reach."""

STEPS, BATCH = 2, 6
"""Local steps of a round, and examples in each: a client trains on up to 12 distinct ones."""

ROUNDS: Sequence[Sequence[str]] = (
    ("dot", "gus"),
    ("ada", "ben", "cyd", "dot", "eve"),
    ("ada", "ben", "cyd", "eve", "fay", "gus"),
    ("ben", "eve", "fay"),
    ("ada", "ben", "cyd", "dot", "eve", "fay", "gus"),
)
"""Cohorts of the rounds that are run: odd and even, clients that are new and that come back.

A small one is the first, as what is run briefly is run often: trainings are most of the time.
"""


BRIEFLY = 2
"""Rounds that are run with an option away from its default, or with `max_rank`."""

CLASSES = {"whole": {}, "top": {"layers": "last:1"}, "bottom": {"layers": "first:1"}}
"""Classes of clients that train some blocks of the probe models alone."""
START: Mapping[str, object] = {"start": "olora"}
"""A start of the probe models that takes a part out of the base."""
MAX_RANK = 8
"""The largest rank that states are cut to: twice that of a client, a fourth of the full one."""


@dataclass(frozen=True)
class Weighting:
    """A cohort that the updates of the last round are folded in as, each row another.

    Its members are the clients of that round, over and over, one for each of `weights`; none:
    the clients with their own examples. `still` members beyond those have updates without change,
    and weigh 4 each. `fractions` are for strategies that apply late updates, which count for less.
    """

    name: str
    weights: Sequence[float] = ()
    still: int = 0
    fractions: bool = False


WEIGHTINGS: Sequence[Weighting] = (
    Weighting("7 clients with their own examples"),
    Weighting("7 clients of one example", (1,) * 7),
    Weighting("7 clients, the first of 3,000,000 examples", (3_000_000, 2, 5, 1, 9, 4, 7)),
    Weighting("7 clients, the last of 3,000,000 examples", (2, 5, 1, 9, 4, 7, 3_000_000)),
    Weighting("5 clients of 2 to 9 billion examples", (3e9, 2e9, 9e9, 5e9, 4e9)),
    Weighting("6 clients of 1 to 100,000 examples", (1, 100_000, 10, 10_000, 100, 1_000)),
    Weighting("5 clients of 2 to 400 examples", (400, 2, 17, 30, 5)),
    Weighting("2 clients of 1 and 6 examples", (1, 6)),
    Weighting("1 client", (3,)),
    Weighting("40 clients of 1 to 23 examples", tuple(1 + 7 * i % 23 for i in range(40))),
    Weighting("5 clients and 2 whose update changes nothing", (8, 1, 30, 4, 12), still=2),
    Weighting("7 late clients", (0.25, 2.5, 0.125, 6.9, 0.6, 0.01, 1.1), fractions=True),
)

REGROUPED: Sequence[Weighting] = (
    Weighting("5 clients", (5, 11, 8, 3, 12)),
    Weighting("6 clients", (2, 7, 1, 30, 9, 12)),
    Weighting("7 clients", (3_000_000, 2, 5, 1, 9, 4, 7)),
)
"""Cohorts that are folded in other orders and through other gateways."""

ORDERS, TREES = 2, 2
"""Random orders, and random trees of gateways, of each cohort."""


@dataclass(frozen=True)
class Trial:
    """A value of an option, options without which it has no effect, and rounds until it has one."""

    value: object
    beside: Mapping[str, object] = field(default_factory=dict)
    rounds: int = BRIEFLY


TRIALS: Mapping[tuple[str, str], Sequence[Trial]] = {
    ("fedex_lora", "compact_at"): [Trial(1.0, rounds=3)],
    ("flora", "compact_at"): [Trial(1.0)],
    ("mixed", "size"): [Trial(1024)],
    ("fedmezo", "interval"): [Trial(1, {"directions": "low_rank"})],
}
"""(strategy, option) → values for models as small, where the option's own example has no effect."""
