"""Ranks: the best adapter of a rank, or of the smallest one that keeps enough.

Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
"""

from dataclasses import dataclass

import torch
from scipy import linalg
from torch import Tensor

from corolla.edits.update import Full, Low, Update, decomposed


@dataclass(frozen=True)
class Cut:
    """An update of a smaller rank, and the squares of the singular values lost and in all."""

    update: Low
    lost: float
    total: float


def cut(update: Update, rank: int) -> Cut:
    """The best update of rank at most `rank`; factors of no more are left as they are."""
    if isinstance(update, Low) and update.rank <= rank:
        return Cut(update, 0.0, float(decomposed(update)[1].square().sum()))
    return _kept(update, rank, 1.0)


def keep(update: Update, share: float) -> Cut:
    """The best update of the smallest rank, one at least, that keeps `share` of Σ S²."""
    return _kept(update, None, share)


def _kept(update: Update, rank: int | None, share: float) -> Cut:
    if isinstance(update, Full):
        return _of_matrix(update, rank, share)
    u, s, vt = decomposed(update)
    square = s.square()
    count = _count(square, float(square.sum()), rank, share)
    root = s[:count].sqrt()
    low = Low(u[:, :count] * root, root[:, None] * vt[:count])
    return Cut(low, float(square[count:].sum()), float(square.sum()))


def _of_matrix(update: Full, rank: int | None, share: float) -> Cut:
    """The same of a matrix, from the eigenvectors of D Dᵀ or Dᵀ D, whichever is smaller.

    It takes a tenth of the time of an SVD, and is D times the projector onto the eigenvectors,
    which is exact in D: errors of a direction count by the square of its singular value, and what
    is smaller than 1e-8 of the largest one is lost in rounding.
    """
    matrix = update.matrix
    wide = matrix.shape[0] <= matrix.shape[1]
    total = float(matrix.square().sum())
    square, kept = _largest(matrix @ matrix.T if wide else matrix.T @ matrix, rank, share, total)
    # The other side carries the singular values: their roots are shared, as in all adapters.
    other = kept.T @ matrix if wide else matrix @ kept
    root = other.norm(dim=1 if wide else 0).sqrt()
    shared = torch.where(root > 0, 1 / root, 0.0)
    if wide:
        low = Low(kept * root, other * shared[:, None])
    else:
        low = Low(other * shared, kept.T * root[:, None])
    return Cut(low, max(0.0, total - float(square.sum())), total)


def _largest(gram: Tensor, rank: int | None, share: float, total: float) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors (n, k)) of those that are kept, the largest first.

    Where few are asked for, LAPACK finds those alone, in half of the time.
    """
    size = len(gram)
    if rank and share == 1 and 4 * rank < size:
        found = linalg.eigh(gram.numpy(), subset_by_index=(size - rank, size - 1), driver="evr")
        values, vectors = (torch.from_numpy(own) for own in found)
    else:
        values, vectors = torch.linalg.eigh(gram)
    square, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    count = _count(square, total, rank, share)
    return square[:count], vectors[:, :count]


def _count(square: Tensor, total: float, rank: int | None, share: float) -> int:
    """How many singular values, of these squares from the largest on, are kept."""
    count = min(len(square), rank or len(square))
    if share < 1:
        enough = int((square.cumsum(0) < share * total).sum()) + 1
        count = min(count, enough)
    return count
