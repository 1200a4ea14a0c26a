"""Default learning rates, by what is trained and how."""

from collections.abc import Mapping
from typing import Any

from corolla.errors import ConfigError
from corolla.strategies import registry

LR_FIRST_ORDER = {"ia3": 3e-3, "prompt": 3e-3, "full": 3e-5}
"""What is trained → the default lr of first-order strategies where it is not 3e-4, that of LoRA.

The embedded model takes ten times as much, and all its parameters as much as an adapter.
"""

LR_ZEROTH_ORDER = {
    ("lora", True): 3e-3,
    ("lora", False): 1e-4,
    ("full", True): 3e-4,
    ("full", False): 1e-6,
}
"""(what is trained, whether on the embedded model) → the default lr of zeroth-order strategies."""


def zeroth_order(parameters: object, embedded: bool) -> float:
    """The rate of LR_ZEROTH_ORDER; what is neither all parameters nor LoRA takes that of LoRA."""
    return LR_ZEROTH_ORDER["full" if parameters == "full" else "lora", embedded]


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rate, and the number of steps, of a run for which these values are given.

    The embedded model is a hundred times smaller than others: it wants a higher rate. A
    zeroth-order step is as noisy as there are parameters: it wants a far lower one.
    """
    try:
        known = registry.find(str(values.get("strategy", "fedavg")))
    except ConfigError:  # said when the strategy is built
        known = None
    embedded = values.get("model", "embedded") == "embedded"
    if known and known.trainers[0] == "zeroth_order":
        return {"lr": zeroth_order(values.get("parameters"), embedded), "local_steps": 50}
    role = str(values.get("parameters", "lora"))
    if embedded:
        role = "lora" if role == "full" else role  # a million parameters are no more than that
    rate = LR_FIRST_ORDER.get(role, 3e-4)
    return {"lr": float(f"{10 * rate:g}") if embedded else rate}


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
