"""CorDA: directions of a weight by how much the inputs of a context use them.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223.
"""

import torch
from torch import Tensor

from corolla.errors import ModelError
from corolla.starts.inputs import moments
from corolla.starts.material import Material, oriented
from corolla.tensors import factors
from corolla.types import Params

_DAMPING, _LARGEST_ERROR, _DOUBLINGS = 0.01, 0.05, 40


def adapter(material: Material) -> Params:
    """The start of W C = U S Vᵀ, where C is the damped second moment of inputs on public rows:
    B = U √(S / s), A = √(S / s) Vᵀ C⁻¹, of the r largest S (`corda_ipm`) or smallest (`corda_kpm`).

    ipm learns the task that the rows show, kpm keeps what they show: rows are then questions that
    the model knows. In fp64; ‖s B A C‖_F / ‖W C‖_F = √(Σ_chosen S² / Σ S²). A module takes
    16 in² bytes and an inverse.

    Raises DataError for rows that cannot be used or belong to a client, ModelError for inputs that
    are not finite, or of which no moment can be inverted.
    """
    rank, scaling = material.spec.rank, material.spec.scaling
    first = material.config.start == "corda_ipm"
    start: dict[str, Tensor] = {}
    for module, moment in moments(material, relative=True):
        damped, inverse = inverted(moment, module)
        weight = oriented(material.layer(module)).double()
        u, s, vt = torch.linalg.svd(weight @ damped, full_matrices=False)
        chosen = slice(0, rank) if first else slice(len(s) - rank, len(s))
        root = (s[chosen] / scaling).sqrt()
        start[module + factors.B] = u[:, chosen] * root
        start[module + factors.A] = root[:, None] * (vt[chosen] @ inverse)
    return start


def inverted(moment: Tensor, module: str) -> tuple[Tensor, Tensor]:
    """(C + d · mean(diag C) · I, its inverse), d doubled from 0.01 until the inverse is one."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    damping = _DAMPING
    for _ in range(_DOUBLINGS):
        damped = moment + damping * moment.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and float((damped @ inverse - eye).norm()) < _LARGEST_ERROR:
            return damped, inverse
        damping *= 2
    raise ModelError(f"the inputs of {module} on the public rows are all zero: use other rows")
