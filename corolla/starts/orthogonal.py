"""Factors that are both away from zero, with a product of zero.

The start named "orthogonal" by peft, after https://datta0.github.io/posts/rethink-lora-init.
"""

import torch
from torch import Tensor

from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """A lies in the odd rows of one random orthogonal matrix, B in its even rows: B A = 0.

    A = (X Q_odd)ᵀ / 10 and B = Y Q_even / 10 with standard normal X (in, r/2) and Y (out, r/2).
    Both factors have gradients from the first step, and nothing is taken out of the base.
    """
    rank = material.spec.rank
    start: dict[str, Tensor] = {}
    for module, (out, into) in material.model.shapes.items():
        draw = material.generator(module)
        q = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64)).Q
        x = torch.randn(into, rank // 2, generator=draw, dtype=torch.float64)
        y = torch.randn(out, rank // 2, generator=draw, dtype=torch.float64)
        start[module + factors.A] = (x @ q[0::2]).T / 10
        start[module + factors.B] = y @ q[1::2] / 10
    return start
