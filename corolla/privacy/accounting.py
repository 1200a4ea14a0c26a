"""The privacy cost of Gaussian noise released: epsilon, and the noise that a budget needs.

Everything is (epsilon, delta)-DP for neighbours of which one has an example, or a client, more than
the other. The truth is the privacy loss distribution of dp-accounting (Doroshenko et al., "Connect
the Dots", PETS 2022, arXiv 2207.04380); where nothing is amplified, the closed form of the Gaussian
mechanism (Balle and Wang, ICML 2018, arXiv 1805.06530). RDP and PRV of opacus are second opinions.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from typing import Any

from corolla.errors import StoppedError

_INTERVAL = 0.03
"""Privacy losses are told apart at this part of the standard deviation of that of one release.

Rounding to a grid of width h adds at most h²/4 to a variance v: epsilon, which grows as √v, is too
large by a part of h²/(8 v), here 1e-4.
"""

_COARSEST = 2.0**-10
"""The widest grid: losses of little noise are no Gaussians, their tails count."""

_HOPELESS = 40.0
"""From this epsilon on RDP is good enough: a distribution of such losses takes minutes to make."""

_ORDERS = (1.1, 1.25, 1.5, 1.75, *range(2, 64), 96, 128, 256, 512, 1024)
"""Of RDP: few that are no whole numbers, for these take long where there is much noise."""

_PRECISION = 1e-3
"""Calibrated noise is at most this part larger than what the budget needs."""

_LEAST = math.log(1e-3)
"""Of a calibrated noise multiplier: budgets that allow less noise get this."""

_NONE = 1e-6
"""Less noise than this part of what it hides is none: fp64 cannot tell what it would cost."""


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
    """Returns the epsilon of `releases` together, at `delta`; ∞ where one is without noise.

    Below 40 the PLD, an upper bound that is tight to a part of 1e-3; from there on RDP.
    """
    return _epsilon(_counted(releases), delta)


def combined(noise_multipliers: Sequence[float]) -> float:
    """The noise multiplier of one look at a sum that tells as much as all these looks at it."""
    first, *others = noise_multipliers
    return 1 / math.sqrt(math.fsum(z**-2 for z in noise_multipliers)) if others else first


def calibrate(
    epsilon_wanted: float, delta: float, count: int, sampling_probability: float
) -> float:
    """The smallest noise multiplier with which `count` releases cost at most `epsilon_wanted`."""
    return _calibrate(epsilon_wanted, delta, count, sampling_probability)


def second_opinions(releases: Iterable[Release], delta: float) -> Mapping[str, float]:
    """Epsilon as opacus says: RDP (an upper bound, not tight) and PRV (the end of its interval).

    From 40 on without PRV, whose grid would not fit into memory.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    counted = _counted(releases)
    if any(z < _NONE for z, _, _ in counted):
        return {"RDP": math.inf}
    found: dict[str, float] = {}
    for name, accountant in (("RDP", RDPAccountant()), ("PRV", PRVAccountant())):
        accountant.history = list(counted)
        with warnings.catch_warnings(action="ignore"):  # of logarithms of 0 that it then leaves out
            found[name] = float(accountant.get_epsilon(delta=delta)) if counted else 0.0
        if found["RDP"] > _HOPELESS:
            break
    return found


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns epsilon of a Gaussian mechanism whose neighbours are `mu` standard deviations apart.

    Solves Φ(mu/2 - ε/mu) - e^ε Φ(-mu/2 - ε/mu) = delta (Balle and Wang, theorem 8).
    """
    if mu <= 0 or mu == math.inf:
        return max(0.0, mu)
    from scipy.optimize import brentq  # half a second, which runs without privacy do not wait for
    from scipy.special import log_ndtr, ndtr

    def over(e: float) -> float:
        near, far = float(ndtr(mu / 2 - e / mu)), float(log_ndtr(-mu / 2 - e / mu))
        return near - math.exp(e + far) - delta

    if over(0.0) <= 0:
        return 0.0
    high = 1.0
    while over(high) > 0:
        high *= 2
    return float(brentq(over, 0.0, high, xtol=1e-10))


@contextmanager
def while_wanted(wanted: Callable[[], bool]) -> Iterator[None]:
    """Ends accounting with StoppedError, between two looks at all releases, once it is not wanted.

    A look at a million releases takes seconds.
    """
    before = _waited_for.set(wanted)
    try:
        yield
    finally:
        _waited_for.reset(before)


_waited_for: ContextVar[Callable[[], bool]] = ContextVar("waited_for", default=lambda: True)

_Counted = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sampling probability, count), each pair of the first two once."""


def _counted(releases: Iterable[Release]) -> _Counted:
    counted = Counter[tuple[float, float]]()
    for release in releases:
        if release.count and release.sampling_probability > 0:
            q = min(1.0, release.sampling_probability)
            counted[release.noise_multiplier, q] += release.count
    return tuple(sorted((z, q, count) for (z, q), count in counted.items()))


@lru_cache(maxsize=4096)
def _epsilon(counted: _Counted, delta: float) -> float:
    if not _waited_for.get()():
        raise StoppedError("given up: nobody waits for this accounting any more")
    if any(z < _NONE for z, _, _ in counted):
        return math.inf
    if all(q == 1 for _, q, _ in counted):
        return gaussian_epsilon(math.sqrt(math.fsum(n / z / z for z, _, n in counted)), delta)
    most = _by_rdp(counted, delta)
    return most if most > _HOPELESS else min(most, _by_pld(counted, delta))


@lru_cache(maxsize=4096)
def _calibrate(wanted: float, delta: float, count: int, q: float) -> float:
    from scipy.optimize import brentq

    precision = (_PRECISION if q < 1 else 1e-9) / 4

    def root(accountant: Callable[[_Counted, float], float], start: float) -> float:
        """The logarithm of the least noise multiplier, and at most 2 · precision more."""

        def over(log_z: float) -> float:
            return min(accountant(((math.exp(log_z), q, count),), delta), 1e6) - wanted

        low = high = start
        step = math.log(1.25)
        while over(high) > 0:
            low, high, step = high, high + step, 2 * step
        while low == high or (over(low) <= 0 and low > _LEAST):
            low, step = low - step, 2 * step
        if over(low) <= 0:
            return low
        found: float = brentq(over, low, high, xtol=precision)
        while over(found) > 0:  # it is met from either side
            found += precision
        return found

    # RDP is quick and asks for a little more noise than is needed: the search begins there.
    return math.exp(root(_epsilon, root(_by_rdp, 0.0) if q < 1 else 0.0))


def _by_rdp(counted: _Counted, delta: float) -> float:
    """An upper bound: Rényi DP (Mironov, CSF 2017, arXiv 1702.07476).

    It is the least over all orders of a convex function of the order, divided by the order minus 1:
    it falls, then rises, so that a search by halves looks at few of them. Where two neighbours are
    equal, as where both are ∞, all are looked at. What is too little to tell is 0 at the first.
    """

    @cache
    def at(index: int) -> float:
        return _at_orders(_ORDERS[index : index + 1], counted, delta)

    low, high = 0, len(_ORDERS) - 1 if at(0) > 0 else 0
    while low < high:
        middle = (low + high) // 2
        if at(middle) < at(middle + 1):
            high = middle
        elif at(middle) > at(middle + 1):
            low = middle + 1
        else:
            return _at_orders(_ORDERS, counted, delta)
    return at(low)


def _at_orders(orders: Sequence[float], counted: _Counted, delta: float) -> float:
    """The least epsilon that Rényi DP proves at one of these orders."""
    from dp_accounting import NeighboringRelation, dp_event, rdp

    accountant = rdp.RdpAccountant(
        [float(o) for o in orders], NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    absl.setLevel(logging.ERROR)  # it warns of orders left out, which only makes the bound larger
    try:
        for z, q, count in counted:
            one = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z))
            accountant.compose(dp_event.SelfComposedDpEvent(one, count))
        return float(accountant.get_epsilon(delta))
    finally:
        absl.setLevel(level)


def _by_pld(counted: _Counted, delta: float) -> float:
    interval = _interval(counted)
    parts = [_loss(z, q, interval).self_compose(count) for z, q, count in counted]
    total = reduce(lambda one, other: one.compose(other), parts)
    return float(total.get_epsilon_for_delta(delta))


def _interval(counted: _Counted) -> float:
    """A power of two, so that losses are found again when others join them."""
    variance = 0.0
    for z, q, count in counted:
        # Of the loss of one release: about q² (e^(1/z²) - 1), at q = 1 it is 1/z².
        variance += count * min(q * q * math.expm1(min(1 / z / z, 100.0)), 1 / z / z)
    of_one = math.sqrt(variance / sum(count for _, _, count in counted))
    return min(_COARSEST, 2.0 ** math.floor(math.log2(_INTERVAL * of_one)))


@lru_cache(maxsize=32)
def _loss(z: float, q: float, interval: float) -> Any:
    """The distribution of the privacy loss of one release."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        z, value_discretization_interval=interval, sampling_prob=q
    )
