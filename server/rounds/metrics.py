"""Metrics of a round: means over clients, staleness, simulated seconds."""

import math
from collections.abc import Mapping, Sequence

from corolla.config.run import RunConfig
from corolla.server.rounds import simulated_time
from corolla.server.rounds.tasks import Traffic
from corolla.types import PER_USER, Metrics

_SUMMED = (
    *("target_tokens", "local_steps", "skipped"),
    *("scalars", "zero_scalars", "skipped_scalars"),
    *("scored_sequences", "kept_sequences"),
)
"""Metrics that count something: of all clients together, not on average."""


def mean_metrics(metrics: Mapping[str, Metrics], examples: Mapping[str, int]) -> Metrics:
    """Example-weighted means of what clients report; tokens, steps and skips are summed.

    Of epsilon it is the largest: a client is promised what it was told, whatever others were. Of
    PER_USER it is the part of the clients that say it.
    """
    names = sorted({name for reported in metrics.values() for name in reported})
    result: dict[str, float] = {}
    for name in names:
        values = {c: m[name] for c, m in metrics.items() if name in m}
        if name == "epsilon":
            result[name] = max(values.values())
        elif name == PER_USER:
            result[name] = math.fsum(values.values()) / len(metrics)
        elif name in _SUMMED:
            result[name] = math.fsum(values.values())
        else:
            weighted = math.fsum(value * examples[c] for c, value in values.items())
            result[name] = weighted / sum(examples[c] for c in values)
    return result


def staleness(config: RunConfig, steps: Sequence[int]) -> Metrics:
    """How many steps of the server updates were behind, where they can be."""
    if not config.buffer:
        return {}
    return {"staleness": sum(steps) / len(steps), "staleness_max": float(max(steps))}


def simulated_seconds(
    config: RunConfig, traffic: Traffic, examples: Mapping[str, int], dropped: Mapping[str, str]
) -> float | None:
    """Simulated seconds of a round; None where time is not simulated."""
    if not config.simulates_time:
        return None
    taken = [traffic.took[client] for client in examples]
    return simulated_time.round_seconds(config, taken, missing=bool(dropped))
