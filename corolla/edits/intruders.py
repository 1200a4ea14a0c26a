"""Intruder dimensions: strong directions of the tuned weights that the base does not have.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv
2410.21228.
"""

import torch
from torch import Tensor

from corolla.edits.update import Low, Update, balanced, product, total


def mitigate(update: Update, base: Tensor, first: int, eps: float, keep: float) -> Update:
    """D + (λ - 1) Σ σ u vᵀ over the intruders of W + D: λ = `keep` of 1 leaves all, 0 takes all.

    An intruder is one of the `first` left singular vectors of W + D of which no cosine to one of W
    reaches `eps` in size. What is taken away has factors, so that an update that has some keeps
    them, of a rank that is larger by the intruders. Two SVDs of the module's shape in fp64; `base`
    is W (out, in).
    """
    u, s, vt = torch.linalg.svd(base + product(update), full_matrices=False)
    known = torch.linalg.svd(base, full_matrices=False).U
    cosines = (u[:, :first].T @ known).abs().amax(dim=1)
    odd = (cosines < eps).nonzero()[:, 0]
    if not len(odd) or keep == 1:
        return update
    taken = Low(u[:, odd] * s[odd], (keep - 1) * vt[odd])
    return balanced(total([update, taken]))
