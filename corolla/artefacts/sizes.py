"""Ranks and bytes of a run's adapters in words, from the object `served` of run.json."""

from collections.abc import Mapping
from typing import Any

from corolla.host.text import human_bytes

SERVED = "served"
"""The folder beside adapter/."""


def sizes(told: Mapping[str, Any]) -> tuple[str, str]:
    """Rank and bytes of adapter/ and of served/ for people, from the object of run.json.

    The second is "" where the exact one is served itself.
    """
    exact = _size(told["exact"])
    return exact, "" if told["folder"] != SERVED else f"{_size(told)}, {told['error']:.2%} off"


def sentence(told: Mapping[str, Any]) -> str:
    """The result line: rank and bytes of both, and what served/ lost, from run.json's object."""
    exact, small = sizes(told)
    if not small:
        return f"adapter/ is of {exact}, and is served itself"
    return (
        f"adapter/ is of {exact}; served/ of {small} in effective weights, held-out loss "
        f"{told['loss']:.4f} for {told['exact']['loss']:.4f}"
    )


def _size(told: Mapping[str, Any]) -> str:
    return f"rank {told['rank']}, {human_bytes(told['bytes'])}"
