"""Gradients of weights of a resident base model, as many at a time as memory has room for."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from corolla.data.encoding import Encoded, collate
from corolla.evaluation.scoring import loss_sum
from corolla.models.trainable import Trainable

AT_ONCE = 1 << 26
"""Values that exist at a time, unless one module alone has more: 256 MB in fp32."""


def sums(
    model: Trainable,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Sequence[Encoded]],
    divisor: float,
    squared: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(name, Σ g, or Σ g², over batches) of all weights, in fp32 and in their forms.

    g is the gradient of a batch's summed loss by `divisor`. All batches go through the model once
    for each set of weights whose gradients fit AT_ONCE: memory for time.
    """
    for names in sets({name: weight.numel() for name, weight in weights.items()}):
        own = [weights[name].requires_grad_(True) for name in names]
        totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in own]
        try:
            for batch in batches:
                inputs = collate(batch, model.base.pad_id, model.device)
                loss = loss_sum(model.model, inputs) / divisor
                found = torch.autograd.grad(loss, own, materialize_grads=True)
                for total, gradient in zip(totals, found, strict=True):
                    total += gradient.square() if squared else gradient
        finally:
            for weight in own:
                weight.requires_grad_(False)
        yield from zip(names, totals, strict=True)


def sets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in sets of at most AT_ONCE values by their sizes, in order; at least one in each."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > AT_ONCE:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
