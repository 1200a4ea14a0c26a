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


def in_words() -> str:
    """The default rate, as `defaults` has it, of everything that may be trained."""

    def rates(strategy: str = "fedavg", parameters: str = "lora") -> tuple[str, str]:
        given = {"strategy": strategy, "parameters": parameters}
        small, large = (defaults({**given, "model": name})["lr"] for name in ("embedded", "other"))
        return f"{large:g}", f"{small:g}"

    usual, embedded = rates()
    forward = [rates("seed_pool", parameters) for parameters in ("lora", "full")]
    others = {name: rates(parameters=name) for name in ("ia3", "prompt", "full")}
    by_name = "".join(f"; {name}: {large} ({small})" for name, (large, small) in others.items())
    return (
        f"{usual} ({embedded} on the embedded model){by_name}; "
        f"zeroth order: {forward[0][0]} ({forward[0][1]}), full: {forward[1][0]} ({forward[1][1]})"
    )
