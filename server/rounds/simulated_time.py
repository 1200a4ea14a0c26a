"""Simulated devices: how long a task takes, and who stays silent.

Functions of the config and of byte counts alone: a resumed run has the same times, on any machine.
"""

from collections.abc import Iterable

import torch

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass


def seconds(config: RunConfig, name: str, steps: int, down: int, up: int) -> float:
    """From sending a task to its reply, for a client of a class ("" without classes).

    `steps` · step_seconds / speed + `down` / download + `up` / upload: local steps, and bytes of
    payload, framing apart.
    """
    own = config.classes.get(name, ClientClass())
    training = steps * (config.step_seconds or 1.0) / (own.speed or 1.0)
    received = down / own.download if own.download else 0.0
    return training + received + (up / own.upload if own.upload else 0.0)


def round_seconds(config: RunConfig, accepted: Iterable[float], missing: bool) -> float:
    """Of a round: its slowest accepted reply; the deadline, if there is one, for who is missing.

    0 where nobody was asked: a Poisson draw may be empty.
    """
    if missing and config.deadline_simulated:
        return config.deadline_simulated
    return max(accepted, default=0.0)


def silent(config: RunConfig, name: str, client: str, round: int) -> bool:
    """Returns whether a client of a class does not answer in a round, by its probability `drop`."""
    probability = config.classes[name].drop if name else 0.0
    generator = seeds.generator(config.seed, "drop", client, round)
    return float(torch.rand((), generator=generator, dtype=torch.float64)) < probability
