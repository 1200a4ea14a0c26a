"""Who takes part in a round."""

from collections.abc import Sequence

import torch

from corolla import seeds


def sample(clients: Sequence[str], size: int, seed: int, round: int) -> list[str]:
    """`size` clients drawn uniformly without replacement, sorted; a function of seed and round.

    Every client is in the cohort with probability size / len(clients).
    """
    ordered = sorted(clients)
    drawn = torch.randperm(len(ordered), generator=seeds.generator(seed, "cohort", round))
    return sorted(ordered[i] for i in drawn[:size].tolist())
