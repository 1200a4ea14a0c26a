"""How many steps a client takes in a round, on which examples, at which learning rate."""

import math
from collections.abc import Iterator
from fractions import Fraction

import torch

from corolla import seeds
from corolla.config.run import RunConfig


def steps_per_round(config: RunConfig, sequences: int) -> int:
    """Local steps of a client that holds this many sequences."""
    if config.local_epochs is not None:
        kept = hardest(config, sequences)
        return math.ceil(kept / config.batch_size) * config.local_epochs
    return config.local_steps


_SCORED = 16
"""Sequences that are scored, at most, as a multiple of those that a round's steps take: with more,
scoring would be more work than training."""


def scored(config: RunConfig, sequences: int) -> int:
    """The number of a client's sequences that are scored in a round, to find the hardest."""
    if config.keep_hardest in (None, 1):
        return 0
    return min(sequences, _SCORED * steps_per_round(config, sequences) * config.batch_size)


def hardest(config: RunConfig, sequences: int) -> int:
    """⌈keep_hardest · sequences⌉: how many of so many sequences are trained on."""
    # 0.1 of 30 is 3: not so for the nearest binary number.
    return math.ceil(Fraction(str(config.keep_hardest or 1)) * sequences)


def batches(config: RunConfig, sequences: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step: every epoch in a new order, different from round to round."""
    generator = seeds.generator(seed, "order")
    left = steps_per_round(config, sequences)
    while left:
        order = torch.randperm(sequences, generator=generator).tolist()
        for start in range(0, len(order), config.batch_size):
            yield order[start : start + config.batch_size]
            left -= 1
            if not left:
                return


def step_size(config: RunConfig, round: int, sequences: int) -> float:
    """-lr / queries of a zeroth-order client in a round, as it travels: a number of fp32.

    The rate is that of the round's middle: within a round it stays the same, because what travels
    is a sum of scalars.
    """
    steps = steps_per_round(config, sequences)
    step = -config.lr * rate(config, round, steps, steps // 2) / config.queries
    return float(torch.tensor(step, dtype=torch.float32))


def rate(config: RunConfig, round: int, steps: int, step: int = 0) -> float:
    """The factor of lr at a step of a round of `steps`: warm-up, then constant or decay to 0."""
    done = (round - 1) * steps + step
    total, warmup = config.rounds * steps, config.warmup_rounds * steps
    if done < warmup:
        return (done + 1) / math.ceil(warmup)
    progress = (done - warmup) / max(1.0, total - warmup)
    if config.schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0
