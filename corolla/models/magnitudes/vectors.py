"""The magnitudes of DoRA by name and shape, and the weights that they lead to.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353, equation 5:
W' = m (W + s B A) / ‖W + s B A‖, with the norm of each row (out) of a weight (out, in). A vector of
them has the name that peft saves it by, and is no factor: strategies average it as they average the
head of a classifier.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SUFFIX = ".lora_magnitude_vector"
"""The end of the name of a vector of magnitudes (out,), after the name of its module."""


def shapes(modules: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the vectors of linear layers, name → (out, in)."""
    return {name + SUFFIX: (shape[0],) for name, shape in modules.items()}


def change(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """W' - W in fp64: the change of a weight (out, in), with delta = s B A and m (out,)."""
    whole = weight.double()
    moved = whole + delta.double()
    length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    turned: Tensor = magnitude.double().unsqueeze(1) / length * moved
    return turned - whole
