"""S2FT: train whole channels of a weight, as an adapter with a one-hot factor.

Yang et al., "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
NeurIPS 2024, arXiv 2412.06289.
"""

import torch
from torch import Tensor

from corolla.starts.material import Material, oriented
from corolla.tensors import factors
from corolla.types import Params


def adapter(material: Material) -> Params:
    """The adapter s B A = V P_J: A holds rows J of the identity over s, B changes V of columns J.

    r input channels of each layer are drawn from the run's seed, as the paper's are, or are those
    whose weights have the largest (`channels_large`) or smallest norm. A stays as it is, so that
    strategy=ffa_lora averages changes of whole columns exactly; with its train=A the factors swap,
    and rows of the weight are trained. Every layer has r channels: the paper draws over all layers
    together.
    """
    rank, scaling = material.spec.rank, material.spec.scaling
    rows = material.config.options.get("train") == "A"
    start: dict[str, Tensor] = {}
    for module, (out, into) in material.model.shapes.items():
        chosen = _chosen(material, module, out if rows else into, rows)
        one_hot = torch.zeros(rank, out if rows else into)
        one_hot[torch.arange(rank), chosen] = 1 / scaling
        start[module + factors.A] = torch.zeros(rank, into) if rows else one_hot
        start[module + factors.B] = one_hot.T if rows else torch.zeros(out, rank)
    return start


def _chosen(material: Material, module: str, channels: int, rows: bool) -> Tensor:
    """The channels of a layer, ascending; of equal norms the first."""
    rank, name = material.spec.rank, material.config.start
    if name == "channels":
        order = torch.randperm(channels, generator=material.generator(module))
    else:
        norms = oriented(material.layer(module)).norm(dim=1 if rows else 0).cpu()
        order = torch.sort(norms, descending=name == "channels_large", stable=True).indices
    return order[:rank].sort().values
