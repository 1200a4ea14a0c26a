"""Privacy auditing in one run: what right guesses prove about epsilon.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv
2305.08846. Each of m canaries is in the data or not, by a fair coin of its own. Who has seen what
the mechanism released guesses r of the coins and abstains from the others; v guesses are right. If
the mechanism is (ε, δ)-DP for neighbours that differ in one canary, that rarely happens (their
theorem 5.2):

    P[right ≥ v] ≤ f(v) + 2 m δ · max_{1 ≤ i ≤ v} (f(v - i) - f(v)) / i,
    f(v) = P[Binomial(r, e^ε / (e^ε + 1)) ≥ v].

So every ε for which this is at most 1 - confidence is refuted.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom

_HIGHEST = 64.0
"""No number of guesses that fits in memory proves as much."""


def lower_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95
) -> float:
    """The lower bound on ε that `right` of `guesses` guesses on `canaries` coins give; ≥ 0.

    Wrong with probability 1 - confidence at most, whatever the mechanism. It says nothing of how
    much smaller than the true ε it is. Raises ValueError unless 0 ≤ right ≤ guesses ≤ canaries.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses on {canaries} canaries")
    chance = 1 - confidence

    def over(e: float) -> float:
        return p_value(canaries, guesses, right, e, delta) - chance

    if over(0.0) >= 0:
        return 0.0
    high = 1.0
    while high < _HIGHEST and over(high) < 0:
        high *= 2
    return float(brentq(over, 0.0, high, xtol=1e-9)) if over(high) >= 0 else high


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """At most how likely so many right guesses are if (ε, δ) holds: theorem 5.2."""
    q = float(expit(epsilon))
    beyond = float(binom.sf(right - 1, guesses, q))
    # f(v - i) - f(v) for i = 1 … v are sums of neighbouring terms of the binomial: no cancellation.
    terms = binom.pmf(np.arange(right - 1, -1, -1), guesses, q)
    slopes = np.cumsum(terms) / np.arange(1, right + 1)
    return min(1.0, beyond + 2 * canaries * delta * float(slopes.max(initial=0.0)))


def ceiling(canaries: int, guesses: int, delta: float, confidence: float = 0.95) -> float:
    """Returns the bound that perfect guessing would prove: no audit of this size says more."""
    return lower_bound(canaries, guesses, guesses, delta, confidence)


def right_guesses(scores: Sequence[float], included: Sequence[bool], guesses: int) -> int:
    """How many guesses are right: the highest half of the scores are "in", the lowest "out".

    The others are abstained from. An odd number of guesses has one more "in". NaN is lowest.
    """
    if not 0 < guesses <= len(scores) == len(included):
        raise ValueError(f"{guesses} guesses, {len(scores)} scores, {len(included)} coins")
    values = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf)
    order = np.argsort(values, kind="stable")
    coins = np.asarray(included, dtype=bool)
    out, into = guesses // 2, guesses - guesses // 2
    return int((~coins[order[:out]]).sum() + coins[order[len(order) - into :]].sum())
