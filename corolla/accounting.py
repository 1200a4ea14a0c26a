"""What releases of Gaussian noise cost in privacy: epsilon, and the noise that a budget needs.

Everything is (epsilon, delta)-DP for neighbours of which one has an example, or a client, more than
the other. The truth is the privacy loss distribution of dp-accounting (Doroshenko et al., "Connect
the Dots", PETS 2022, arXiv 2207.04380); where nothing is amplified, the closed form of the Gaussian
mechanism (Balle and Wang, ICML 2018, arXiv 1805.06530). RDP and PRV of opacus are second opinions.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

_INTERVAL = 1e-4
"""Of the privacy losses that are told apart; the error of epsilon is of this order."""

_HOPELESS = 40.0
"""From this epsilon on RDP is good enough: a distribution of such losses takes minutes to make."""

_PRECISION = 1e-3
"""Calibrated noise is at most this part larger than what the budget needs."""


@dataclass(frozen=True)
class Release:
    """`count` sums with noise of std `noise_multiplier` times what one participant can add to one.

    Each takes part in each sum independently with `sampling_probability` (Poisson sampling); 1: no
    secret chance decides.
    """

    noise_multiplier: float
    sampling_probability: float = 1.0
    count: int = 1


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """What `releases` have cost together, at `delta`; ∞ for one without noise.

    PLD, at most 1e-3 above the true value where that is below 40.
    """
    counted = Counter[tuple[float, float]]()
    for release in releases:
        if release.count and release.sampling_probability > 0:
            counted[release.noise_multiplier, release.sampling_probability] += release.count
    key = tuple(sorted((z, q, count) for (z, q), count in counted.items()))
    return _epsilon(key, delta)


def calibrate(
    epsilon_wanted: float, delta: float, count: int, sampling_probability: float
) -> float:
    """The smallest noise multiplier with which `count` releases cost at most `epsilon_wanted`."""

    def over(z: float) -> float:
        found = epsilon([Release(z, sampling_probability, count)], delta)
        return min(found, 1e6) - epsilon_wanted

    low = high = 1.0
    while over(high) > 0:
        low, high = high, 2 * high
    while low > 1e-3 and over(low) <= 0:
        low, high = low / 2, low
    if over(low) <= 0:
        return low
    found: float = brentq(over, low, high, rtol=_PRECISION / 4)
    while over(found) > 0:  # the root is met from either side
        found *= 1 + _PRECISION / 4
    return found


def second_opinions(releases: Iterable[Release], delta: float) -> Mapping[str, float]:
    """Epsilon as opacus says: RDP (an upper bound, not tight) and PRV (the end of its interval)."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    found: dict[str, float] = {}
    history = [(r.noise_multiplier, r.sampling_probability, r.count) for r in releases]
    for name, accountant in (("RDP", RDPAccountant()), ("PRV", PRVAccountant())):
        accountant.history = list(history)
        found[name] = float(accountant.get_epsilon(delta=delta))
    return found


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Of one Gaussian mechanism whose neighbours are `mu` standard deviations apart.

    Solves Φ(mu/2 - ε/mu) - e^ε Φ(-mu/2 - ε/mu) = delta (Balle and Wang, theorem 8).
    """
    if mu <= 0:
        return 0.0

    def over(e: float) -> float:
        near, far = float(ndtr(mu / 2 - e / mu)), float(log_ndtr(-mu / 2 - e / mu))
        return near - math.exp(e + far) - delta

    if over(0.0) <= 0:
        return 0.0
    high = 1.0
    while over(high) > 0:
        high *= 2
    return float(brentq(over, 0.0, high, xtol=1e-10))


@lru_cache(maxsize=4096)
def _epsilon(counted: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not counted:
        return 0.0
    if any(z <= 0 for z, _, _ in counted):
        return math.inf
    if all(q >= 1 for _, q, _ in counted):
        return gaussian_epsilon(math.sqrt(math.fsum(n / z**2 for z, _, n in counted)), delta)
    # dp-accounting warns of orders that it leaves out, which only makes its bound larger.
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.ERROR)
    try:
        return _by_dp_accounting(counted, delta)
    finally:
        absl.setLevel(level)


def _by_dp_accounting(counted: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation, dp_event, rdp
    from dp_accounting.pld import PLDAccountant

    neighbours = NeighboringRelation.ADD_OR_REMOVE_ONE
    bound = rdp.RdpAccountant(neighboring_relation=neighbours)
    exact = PLDAccountant(neighbours, value_discretization_interval=_INTERVAL)
    for accountant in (bound, exact):
        for z, q, count in counted:
            one = dp_event.GaussianDpEvent(z)
            if q < 1:
                one = dp_event.PoissonSampledDpEvent(q, one)
            accountant.compose(dp_event.SelfComposedDpEvent(one, count))
        if accountant is bound and (most := float(bound.get_epsilon(delta))) > _HOPELESS:
            return most
    return float(exact.get_epsilon(delta))
