"""The update of one module while it is edited: factors, or a matrix of full rank, in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corolla.tensors import factors


@dataclass(frozen=True)
class Low:
    """An update scaling · left (out, r) · right (r, in): as an adapter has it, exact."""

    left: Tensor
    right: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of the left factor."""
        return self.left.shape[1]


@dataclass(frozen=True)
class Full:
    """An update as one matrix (out, in)."""

    matrix: Tensor


Update = Low | Full


def product(update: Update) -> Tensor:
    """The (out, in) matrix."""
    if isinstance(update, Full):
        return update.matrix
    return (update.scaling * update.left) @ update.right


def times(update: Update, number: float) -> Update:
    """The update times a number: the same bits at 1."""
    if isinstance(update, Full):
        return Full(update.matrix * number)
    return replace(update, right=update.right * number)


def total(updates: Sequence[Update]) -> Update:
    """The sum: factors side by side where all have some, else a matrix."""
    if len(updates) == 1:
        return updates[0]
    lows = [update for update in updates if isinstance(update, Low)]
    if len(lows) < len(updates):
        return Full(torch.stack([product(update) for update in updates]).sum(0))
    return Low(
        torch.cat([low.left for low in lows], dim=1),
        torch.cat([low.right * low.scaling for low in lows], dim=0),
    )


def squares(update: Update) -> float:
    """The sum of the squared values of the matrix; of factors without forming it."""
    return inner(update, update)


def inner(one: Update, other: Update) -> float:
    """The sum of the products of the values of two matrices.

    Of factors it is the trace of (L₁ᵀ L₂) (R₂ R₁ᵀ), two small matrices.
    """
    if isinstance(one, Full) or isinstance(other, Full):
        return float((product(one) * product(other)).sum())
    left, right = one.left.T @ other.left, one.right @ other.right.T
    return one.scaling * other.scaling * float((left * right).sum())


def decomposed(low: Low) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, k), S (k,), Vᵀ (k, in)) of a product of factors, largest S first.

    By QR of both factors and the SVD of a small matrix (corolla/tensors/factors.py).
    """
    named = {factors.B: low.left, factors.A: low.right * low.scaling}
    ((_, u, s, vt),) = factors.svd(named)
    return u, s, vt


def balanced(update: Update) -> Update:
    """The same update with factors U √S and √S Vᵀ; a matrix as it is.

    Where parts of a sum cancel, their factors are longer than it, and would be rounded by more.
    """
    if isinstance(update, Full):
        return update
    u, s, vt = decomposed(update)
    root = s.sqrt()
    return Low(u * root, root[:, None] * vt)
