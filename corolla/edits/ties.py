"""TIES: trim, elect a sign, and average those that agree with it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv
2306.01708. The paper trims over all parameters of a model at once; here each module keeps its own
share, as peft's combinations do, so that one module is in memory at a time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from corolla.edits.update import Full, Update, product


def merge(updates: Sequence[Update], density: float, strength: float) -> Full:
    """λ times the mean, place by place, of the trimmed values that have the elected sign.

    The sign is that of the sum of the trimmed values, positive where that is 0.
    """
    sums: Tensor | None = None
    trimmed = []
    for update in updates:
        own = trim(product(update), density)
        sums = own if sums is None else sums + own
        trimmed.append(own)
    if sums is None:
        raise ValueError("nothing to merge")
    sign = torch.where(sums >= 0, 1.0, -1.0).to(sums)
    merged, count = torch.zeros_like(sums), torch.zeros_like(sums)
    for own in trimmed:
        agrees = own.sign() == sign
        merged += torch.where(agrees, own, 0.0)
        count += agrees
    return Full(strength * merged / count.clamp(min=1.0))


def trim(matrix: Tensor, density: float) -> Tensor:
    """The share `density` of the values that are largest in size; of equal ones the first."""
    keep = int(density * matrix.numel())
    if keep >= matrix.numel():
        return matrix
    if not keep:
        return torch.zeros_like(matrix)
    size = matrix.abs().reshape(-1)
    place = len(size) - keep
    least = float(np.partition(size.numpy(), place)[place])  # quicker than torch's selection
    kept = size > least
    equal = (size == least).nonzero()[:, 0]
    kept[equal[: keep - int(kept.sum())]] = True
    return torch.where(kept.reshape(matrix.shape), matrix, 0.0)
