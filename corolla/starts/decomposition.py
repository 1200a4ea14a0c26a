"""The largest singular directions of a matrix: exact where that is quick, else by iterations."""

import torch
from torch import Tensor

LARGEST = 1024
"""The shorter side of matrices up to which all singular values are computed: above, that takes a
minute a matrix."""

ITERATIONS = 16
"""Iterations of larger ones, unless they are told."""


def largest(
    matrix: Tensor, rank: int, draw: torch.Generator, iterations: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, rank), S (rank,), Vᵀ (rank, in)) of the largest singular values, largest first.

    By subspace iteration from random columns, twice as many as are kept (Halko, Martinsson and
    Tropp, SIAM Review 2011, arXiv 0909.4061, algorithms 4.4 and 5.1), where `iterations` says how
    many, or the matrix is large; else exact.
    """
    short = min(matrix.shape)
    if iterations is None and short <= LARGEST:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    columns = min(2 * rank + 8, short)
    random = torch.randn(matrix.shape[1], columns, generator=draw).to(matrix)
    q = torch.linalg.qr(matrix @ random).Q
    for _ in range(ITERATIONS if iterations is None else iterations):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]
