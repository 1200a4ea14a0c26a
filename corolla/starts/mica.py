"""MiCA: train what the smallest singular directions of each weight can express.

"Minor Component Adaptation", arXiv 2604.01694.
"""

import torch
from torch import Tensor

from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """B holds the left singular vectors of the r smallest singular values and stays; A is zero."""
    rank = material.spec.rank
    start: dict[str, Tensor] = {}
    for module, weight in material.weights():
        u = torch.linalg.svd(weight, full_matrices=False).U
        start[module + factors.B] = u[:, -rank:]
        start[module + factors.A] = weight.new_zeros(rank, weight.shape[1])
    return start
