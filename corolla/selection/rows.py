"""Scores of the values of weight matrices, by gradients of the base model on public rows.

What is chosen by them goes to everybody, so that no client's row may be among them.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.errors import ModelError
from corolla.evaluation.scoring import loss_sum
from corolla.models.sparse_model import SparseModel

_AT_ONCE = 1 << 26
"""Values of the gradients that exist at a time, unless one module alone has more: 256 MB."""


def fisher(
    model: SparseModel, config: RunConfig, rows: Sequence[Encoded]
) -> Iterator[tuple[str, Tensor]]:
    """(module, Σ over rows of (∂ log p(row) / ∂W)²), with the labels as they are given.

    Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks" (FISH), NeurIPS 2021,
    arXiv 2111.09839. A row at a time: the square of a batch's gradient has the products of rows.
    """
    return _sums(model, [[row] for row in rows], 1.0, squared=True)


def gradient(
    model: SparseModel, config: RunConfig, rows: Sequence[Encoded]
) -> Iterator[tuple[str, Tensor]]:
    """(module, |∂L / ∂W|) of the mean loss over all targets.

    It is the score by which SpIEL grows its set (Ansell et al., "Scaling Sparse Fine-Tuning to
    Large Language Models", 2024, arXiv 2401.16405).
    """
    size, targets = config.micro_batch_size or config.batch_size, sum(row.targets for row in rows)
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return _sums(model, batches, 1 / targets, squared=False)


def _sums(
    model: SparseModel, batches: Sequence[Sequence[Encoded]], factor: float, squared: bool
) -> Iterator[tuple[str, Tensor]]:
    """(module, |Σ g| or Σ g²) over batches, g the gradient of `factor` times their summed loss.

    All batches go through the model once for each set of modules whose gradients fit _AT_ONCE.
    """
    originals = model.originals
    for names in _sets(model.sizes):
        weights = [originals[name].requires_grad_(True) for name in names]
        sums = [torch.zeros_like(weight) for weight in weights]
        try:
            for batch in batches:
                loss = factor * loss_sum(
                    model.model, collate(batch, model.base.pad_id, model.device)
                )
                for own, part in zip(
                    sums, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True
                ):
                    own += part.square() if squared else part
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for name, own in zip(names, sums, strict=True):
            if not math.isfinite(float(own.sum())):
                raise ModelError(f"the gradient of {name} on public rows is not finite")
            yield name, own.abs()


def _sets(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    values = 0
    for name, size in sizes.items():
        if names and values + size > _AT_ONCE:
            yield names
            names, values = [], 0
        names.append(name)
        values += size
    yield names
