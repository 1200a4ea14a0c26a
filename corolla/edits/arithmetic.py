"""Weights: adapters added, averaged and taken away.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
"""

from collections.abc import Sequence

from corolla.edits.update import Update, times, total


def combine(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Σ_j w_j D_j: of factors a stack of rank Σ r_j, which loses nothing."""
    return total([times(update, own) for update, own in zip(updates, weights, strict=True)])
