"""EVA: the directions in which the inputs of a layer vary most.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation", 2024, arXiv 2410.07170.
"""

import torch
from torch import Tensor

from corolla.starts.inputs import moments
from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """A holds the right singular vectors of the r largest singular values of a layer's inputs.

    The inputs are those at all positions of the public rows; B is zero. The decomposition is that
    of all of them, not of one batch after another, and all modules have the run's rank: the paper
    moves ranks between layers, which an adapter of one rank cannot show.

    Raises DataError and ModelError as inputs.moments does.
    """
    rank = material.spec.rank
    start: dict[str, Tensor] = {}
    for module, moment in moments(material):
        vectors = torch.linalg.eigh(moment).eigenvectors
        start[module + factors.A] = vectors[:, -rank:].flip(1).T
        start[module + factors.B] = vectors.new_zeros(material.model.shapes[module][0], rank)
    return start
