"""Default learning rates, by what is trained and how."""

from collections.abc import Mapping
from typing import Any

from corolla.config.sections import kinds
from corolla.types import TrainerName


def defaults(values: Mapping[str, Any], trainer: TrainerName) -> dict[str, Any]:
    """The rate, and the number of steps, of a run for which these values are given.

    `trainer` is how its clients train, unless their class says otherwise.
    """
    embedded = values.get("model", "embedded") == "embedded"
    # A kind that is unknown is refused later, with the names of those there are.
    kind = kinds.KINDS.get(str(values.get("parameters")), kinds.DEFAULT)
    if trainer == "zeroth_order":
        return {"lr": kind.zeroth_order.of(embedded), "local_steps": 50}
    return {"lr": kind.first_order.of(embedded)}


def in_words() -> str:
    """The default rates of all kinds, the usual one first: that of adapters by backpropagation."""
    usual, *others = _unlike_others([(kind.name, kind.first_order) for kind in _ALL])
    usual_forward, *forward = _unlike_others([(kind.name, kind.zeroth_order) for kind in _ALL])
    first = usual.replace(")", " on the embedded model)")
    zeroth = ", ".join([f"zeroth order: {usual_forward}", *forward])
    return "; ".join([first, *others, zeroth])


_ALL = list(kinds.KINDS.values())


def _unlike_others(rates: list[tuple[str, kinds.Rates]]) -> list[str]:
    """The rates of the first kind, then NAME: RATES of each whose rates are others."""
    said = [(name, f"{own.other:g} ({own.embedded:g})") for name, own in rates]
    usual = said[0][1]
    return [usual, *(f"{name}: {own}" for name, own in said if own != usual)]
