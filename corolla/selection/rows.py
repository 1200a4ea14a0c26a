"""Scores of the values of weight matrices, by gradients of the base model on public rows.

What is chosen by them goes to everybody, so that no client's row may be among them.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.errors import ModelError
from corolla.evaluation import weight_gradients
from corolla.models.sparse_model import SparseModel


def fisher(
    model: SparseModel, config: RunConfig, rows: Sequence[Encoded]
) -> Iterator[tuple[str, Tensor]]:
    """(module, Σ over rows of (∂ log p(row) / ∂W)²), with the labels as they are given.

    Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks" (FISH), NeurIPS 2021,
    arXiv 2111.09839. A row at a time: the square of a batch's gradient has the products of rows.
    """
    return _finite(model, [[row] for row in rows], 1.0, squared=True)


def gradient(
    model: SparseModel, config: RunConfig, rows: Sequence[Encoded]
) -> Iterator[tuple[str, Tensor]]:
    """(module, |∂L / ∂W|) of the mean loss over all targets.

    It is the score by which SpIEL grows its set (Ansell et al., "Scaling Sparse Fine-Tuning to
    Large Language Models", 2024, arXiv 2401.16405).
    """
    size, targets = config.micro_batch_size or config.batch_size, sum(row.targets for row in rows)
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return _finite(model, batches, targets, squared=False)


def _finite(
    model: SparseModel, batches: Sequence[Sequence[Encoded]], divisor: float, squared: bool
) -> Iterator[tuple[str, Tensor]]:
    """(module, |Σ g|, or Σ g², over batches); g: weight_gradients.sums. Raises ModelError."""
    for name, own in weight_gradients.sums(model, model.originals, batches, divisor, squared):
        if not math.isfinite(float(own.sum())):
            raise ModelError(f"the gradient of {name} on public rows is not finite")
        yield name, own.abs()
