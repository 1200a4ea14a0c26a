"""LoftQ with one step: the adapter begins as what quantisation lost.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024,
arXiv 2310.08659.
"""

import torch
from torch import Tensor, nn

from corolla.starts.decomposition import largest
from corolla.starts.material import Material, oriented
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """The product s B A is the best approximation of rank r of W - Q(W), Q(W) as the base has it.

    The base stays Q(W), the same for all, and nothing lies beside it. More steps would quantise
    another residual: another base for every client. Needs the unquantised weights, 4 bytes a
    parameter, on the server alone.
    """
    rank, scaling = material.spec.rank, material.spec.scaling
    start: dict[str, Tensor] = {}
    for module in material.model.shapes:
        whole = oriented(material.unquantised.get_submodule(module))
        lost = whole - computed(material.layer(module), whole.shape[1]).to(whole)
        u, s, vt = largest(lost, rank, material.generator(module))
        root = (s / scaling).sqrt()
        start[module + factors.B] = u * root
        start[module + factors.A] = root[:, None] * vt
    return start


def computed(layer: nn.Module, inputs: int) -> Tensor:
    """The matrix (out, in) that a linear layer multiplies by, however it stores its weight."""
    like = next(layer.parameters())
    number = like.dtype if like.is_floating_point() else torch.float32
    eye = torch.eye(inputs, dtype=number, device=like.device)
    with torch.no_grad():
        bias = layer(torch.zeros_like(eye[:1])).float()
        found: Tensor = layer(eye).float() - bias
    return found.T
