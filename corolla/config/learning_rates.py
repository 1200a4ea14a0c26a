"""Default learning rates, by what is trained and how."""

from collections.abc import Mapping
from typing import Any

from corolla.config import kinds
from corolla.errors import ConfigError
from corolla.strategies import registry


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rate, and the number of steps, of a run for which these values are given."""
    try:
        known = registry.find(str(values.get("strategy", "fedavg")))
    except ConfigError:  # said when the strategy is built
        known = None
    embedded = values.get("model", "embedded") == "embedded"
    # A kind that is unknown is refused later, with the names of those there are.
    kind = kinds.KINDS.get(str(values.get("parameters")), kinds.DEFAULT)
    if known and known.trainers[0] == "zeroth_order":
        return {"lr": kind.zeroth_order.of(embedded), "local_steps": 50}
    return {"lr": kind.first_order.of(embedded)}
