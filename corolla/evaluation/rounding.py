"""The rounding of a model with an adapter: how far it alone moves the logits."""

import torch
from torch import Tensor

from corolla.evaluation import reader
from corolla.models.trainable import Trainable
from corolla.tensors import factors
from corolla.types import Adapter, LoraSpec, Params

_SCALE = 3.0
"""No power of two, which would leave all roundings as they are."""


def rounding(model: Trainable, spec: LoraSpec, rows: dict[str, Tensor], logits: Tensor) -> float:
    """Computes the largest difference from `logits`, those of the adapter that is shown.

    The same products are shown again, of other factors: 3 A beside B / 3, in blocks as well. Where
    large products make large scores of attention, whose softmax is steep, the last bits of weights
    move logits by more than the bits of the logits. The model shows the other factors afterwards.
    """
    other = Adapter(_scaled(model.read()), tuple(_scaled(block) for block in model.frozen))
    model.show(other, spec)
    again, _ = reader.measure(model.model, rows)
    return float(torch.nan_to_num((again - logits).abs().max(), nan=0.0))


def _scaled(params: Params) -> Params:
    return {
        name: tensor * _SCALE
        if factors.is_a(name)
        else tensor / _SCALE
        if factors.is_b(name)
        else tensor
        for name, tensor in params.items()
    }
