"""Membership inference by a threshold on the loss: a baseline, not a bound.

Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", CSF 2018,
arXiv 1709.01604; calibrated by the loss of the untuned model (Watson et al., "On the Importance of
Difficulty Calibration in Membership Inference Attacks", ICLR 2022, arXiv 2111.08440).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class Attack:
    """How well scores tell members from others. AUC 0.5 and TPR = FPR are guessing."""

    auc: float
    tpr_at_1_fpr: float
    """The true-positive rate of the best threshold whose false-positive rate is at most 1 %."""
    members: int
    others: int


def attack(members: Sequence[float], others: Sequence[float]) -> Attack:
    """Higher scores say "member". Raises ValueError without members or others.

    With fewer than 100 others, a false-positive rate of at most 1 % allows none at all.
    """
    if not members or not others:
        raise ValueError(f"{len(members)} members and {len(others)} others: both are needed")
    return Attack(
        auc(members, others), true_positives(members, others, 0.01), len(members), len(others)
    )


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """P[member > other] + P[equal] / 2, from the ranks of all (Mann-Whitney)."""
    ranks = rankdata([*members, *others])  # equal scores share the mean of their ranks
    m, n = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def true_positives(members: Sequence[float], others: Sequence[float], rate: float) -> float:
    """The largest part of the members above a threshold that at most `rate` of the others pass."""
    most = int(np.floor(rate * len(others) + 1e-9))
    highest = np.sort(np.asarray(others, dtype=np.float64))[::-1]
    # Whoever is above the (most + 1)-th highest of the others passes with at most `most` of these.
    return float((np.asarray(members, dtype=np.float64) > highest[most]).mean())
