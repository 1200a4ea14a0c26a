"""PiSSA: train the principal directions of each weight.

Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", NeurIPS 2024, arXiv 2404.02948.
"""

from torch import Tensor

from corolla.starts.decomposition import largest
from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """The start of W = U S Vᵀ: B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ, at the run's scaling s.

    `pissa_N` takes N iterations instead of an exact decomposition; so does any matrix too large
    for one. What the paper gains in a quantised residual needs another base, and is not here.
    """
    name, rank, scaling = material.config.start, material.spec.rank, material.spec.scaling
    iterations = int(name.removeprefix("pissa_")) if name != "pissa" else None
    start: dict[str, Tensor] = {}
    for module, weight in material.weights():
        u, s, vt = largest(weight, rank, material.generator(module), iterations)
        root = (s / scaling).sqrt()
        start[module + factors.B] = u * root
        start[module + factors.A] = root[:, None] * vt
    return start
