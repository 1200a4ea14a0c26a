"""Safe LoRA: an update stays within the directions in which a model was aligned.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language
Models", NeurIPS 2024, arXiv 2405.16833.
"""

from dataclasses import replace

import torch
from torch import Tensor

from corolla.edits.update import Full, Update, inner, squares

ENERGY = 0.9
"""The share of the squared singular values of V whose directions count."""


def projector(difference: Tensor, published: bool = False) -> Tensor | None:
    """Returns P (out, out) of V = W_aligned - W_unaligned (out, in); None where V is zero.

    The orthogonal projector onto the left singular vectors of V with the largest singular values,
    which hold ENERGY of their squares: with all of them it would be the identity for most V. The
    paper's V Vᵀ / ‖V‖_F, with `published`, is no projector: V times 10 makes it 10 times as large.
    """
    if not bool(difference.any()):
        return None
    if published:
        shrinking: Tensor = difference @ difference.T / difference.norm()
        return shrinking
    u, s, _ = torch.linalg.svd(difference, full_matrices=False)
    held = s.square().cumsum(0)
    count = int((held < ENERGY * held[-1]).sum()) + 1
    onto: Tensor = u[:, :count] @ u[:, :count].T
    return onto


def project(update: Update, projection: Tensor | None, tau: float) -> Update:
    """P D where the cosine between P D and D is below τ, else D: factors stay factors."""
    if projection is None or not squares(update):
        return update
    if isinstance(update, Full):
        moved: Update = Full(projection @ update.matrix)
    else:
        moved = replace(update, left=projection @ update.left)
    length = (squares(moved) * squares(update)) ** 0.5
    cosine = inner(moved, update) / length if length else 0.0
    return moved if cosine < tau else update
