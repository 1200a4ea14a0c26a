"""Half reset: a random share of the modules goes back to the base.

The experiment that motivates Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL
2025, arXiv 2404.18466: half of the changed parameters set back restores much of what was lost.
"""

from collections.abc import Collection

import torch

from corolla import seeds


def chosen(modules: Collection[str], share: float, seed: int) -> frozenset[str]:
    """Draws the modules to set to zero: `share` of them, to the nearest whole number."""
    names = sorted(modules)
    order = torch.randperm(len(names), generator=seeds.generator(seed, "reset")).tolist()
    return frozenset(names[i] for i in order[: round(share * len(names))])
