"""OLoRA: orthonormal columns of each weight.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
arXiv 2406.01775.
"""

import torch
from torch import Tensor

from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """The start of W = Q R: B is the first r columns of Q, A the first r rows of R.

    The scaling is not divided out, as in the paper's code: s Q_r R_r leaves the base.
    """
    rank = material.spec.rank
    start: dict[str, Tensor] = {}
    for module, weight in material.weights():
        q, r = torch.linalg.qr(weight)
        start[module + factors.B], start[module + factors.A] = q[:, :rank], r[:rank]
    return start
