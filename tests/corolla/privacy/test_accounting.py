"""Epsilon against published and independent values: closed forms, opacus, numbers of the docs."""

import math

import pytest
from dp_accounting import NeighboringRelation, dp_event, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from corolla.privacy import accounting
from corolla.privacy.accounting import (
    Release,
    calibrate,
    epsilon,
    gaussian_epsilon,
    second_opinions,
)

# (q, noise multiplier, steps, delta): RDP and PRV of opacus 1.6, PLD of dp-accounting 0.6 on a grid
# of 1e-4; rows of 1 in q are one Gaussian mechanism.
ANCHORS = [
    ((0.01, 1.0, 1000, 1e-5), 2.1014, 1.8384, 1.8282),
    ((0.01, 1.0, 10000, 1e-5), 6.7127, 6.1980, 6.1877),
    ((0.1, 1.0, 10, 1e-5), 3.4413, 2.8648, 2.8545),
    ((0.1, 1.0, 100, 1e-5), 7.8993, 7.0571, 7.0466),
    ((0.02, 0.7, 1000, 1e-5), 10.2218, 9.0897, 9.0791),
    ((0.05, 2.0, 500, 1e-6), 3.1019, 2.8828, 2.8726),
    ((0.001, 0.8, 100000, 1e-6), 3.1878, 2.9246, 2.9151),
    ((0.25, 1.5, 60, 1e-5), 8.0649, 7.3470, 7.3366),
    ((1.0, 1.0, 1, 1e-5), 4.7285, 4.3874, 4.3772),
    ((1.0, 5.0, 100, 1e-5), 10.7255, 10.0077, 9.9973),
    ((1.0, 10.0, 50, 1e-5), 3.1890, 2.9534, 2.9432),
    ((0.04, 1.1, 2000, 1e-5), 11.4017, 10.5302, 10.5197),
    ((0.004, 0.6, 5000, 1e-6), 8.3310, 7.2979, 7.2874),
]

# The same without a PLD.
OPACUS = [
    ((0.01, 1.0, 1000, 1e-5), 2.1014, 1.8384),
    ((0.01, 0.8, 1000, 1e-5), 3.6954, 3.1513),
    ((0.01, 1.5, 1000, 1e-5), 1.0130, 0.9276),
    ((0.05, 1.0, 100, 1e-5), 4.0383, 3.5124),
    ((0.10, 1.0, 100, 1e-3), 5.6405, 4.7949),
    ((0.10, 2.0, 200, 1e-5), 3.6797, 3.3699),
]

PRINTED = 6e-5


@pytest.mark.parametrize(("setting", "rdp", "prv", "pld"), ANCHORS)
def test_anchors(
    setting: tuple[float, float, int, float], rdp: float, prv: float, pld: float
) -> None:
    """All 13: the PLD, and that the two other accountants bound it as they should."""
    q, z, steps, delta = setting
    found = epsilon([Release(z, q, steps)], delta)
    opinions = second_opinions([Release(z, q, steps)], delta)
    assert found == pytest.approx(pld, abs=2e-3)
    assert found - 2e-3 <= opinions["PRV"] <= found + 0.0105
    assert opinions["RDP"] >= found
    assert opinions == pytest.approx({"RDP": rdp, "PRV": prv}, abs=PRINTED)


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 8e-3])
@pytest.mark.parametrize("q", [0.003, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("z", [0.1, 0.6, 1.5, 30.0])
def test_the_order_of_rdp_is_the_best_of_all(z: float, q: float, delta: float) -> None:
    """To the bit: a search looks at few orders, here dp-accounting is asked for all."""
    for counted in (((z, q, 3),), ((z, q, 4000), (2 * z, 0.01, 7))):
        accountant = rdp.RdpAccountant(accounting._ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
        for noise, share, count in counted:
            one = dp_event.PoissonSampledDpEvent(share, dp_event.GaussianDpEvent(noise))
            accountant.compose(dp_event.SelfComposedDpEvent(one, count))
        assert accounting._by_rdp(counted, delta) == accountant.get_epsilon(delta)


@pytest.mark.parametrize(("setting", "rdp", "prv"), OPACUS)
def test_anchors_of_opacus(
    setting: tuple[float, float, int, float], rdp: float, prv: float
) -> None:
    """RDP and PRV are what opacus says, and epsilon lies below both."""
    q, z, steps, delta = setting
    opinions = second_opinions([Release(z, q, steps)], delta)
    assert opinions == pytest.approx({"RDP": rdp, "PRV": prv}, abs=PRINTED)
    assert prv - 0.011 <= epsilon([Release(z, q, steps)], delta) <= rdp


@pytest.mark.parametrize(
    ("wanted", "z"), [(1.0, 1.5234), (3.0, 0.8655), (6.0, 0.6766), (8.0, 0.6158)]
)
def test_rdp_of_its_calibrated_noise(wanted: float, z: float) -> None:
    """What opacus finds for a budget by RDP costs that much by RDP, up to its tolerance of 0.01."""
    found = second_opinions([Release(z, 0.01, 1000)], 1e-5)["RDP"]
    assert wanted - 0.01 <= found <= wanted + PRINTED


@pytest.mark.parametrize(
    ("mu", "delta", "wanted"),
    [
        (1.0, 1e-5, 4.3772),
        (2.0, 1e-5, 9.9973),
        (math.sqrt(0.5), 1e-5, 2.9432),
        (math.sqrt(500 * 0.05**2), 1e-6, 5.5509),
        (math.sqrt(20) / 5, 1e-5, 3.8486),
        (math.sqrt(100) / 10, 1e-5, 4.3772),
        # k participations at noise z are one Gaussian mechanism of mu = √k / z.
        (1 / 1, 1e-6, 4.8866),
        (math.sqrt(4) / 2, 1e-6, 4.8866),
        (math.sqrt(16) / 4, 1e-6, 4.8866),
        (math.sqrt(50) / 8, 1e-6, 4.2486),
        (1 / 0.8, 1e-6, 6.3121),
    ],
)
def test_closed_form(mu: float, delta: float, wanted: float) -> None:
    """Of the Gaussian mechanism; and epsilon says the same of releases without amplification."""
    assert gaussian_epsilon(mu, delta) == pytest.approx(wanted, abs=PRINTED)
    assert epsilon([Release(4 / mu, 1.0, 16)], delta) == pytest.approx(wanted, abs=PRINTED)


def test_closed_form_is_the_tradeoff_it_solves() -> None:
    """P(X > t) - e^ε P(Y > t) is delta at the likeliest threshold of N(mu, 1) against N(0, 1)."""
    for mu, delta in ((0.3, 1e-3), (1.0, 1e-5), (5.0, 1e-9), (40.0, 1e-6)):
        e = gaussian_epsilon(mu, delta)
        t = e / mu + mu / 2
        assert norm.sf(t - mu) - math.exp(e + norm.logsf(t)) == pytest.approx(delta, rel=1e-6)


def test_limits_of_the_closed_form() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(1e-6, 1e-5) == 0  # delta alone covers it
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(1e6, 1e-5) > 1e11


@pytest.mark.parametrize(("z", "q"), [(0.5, 0.01), (1.0, 0.1), (1.0, 0.5), (3.0, 0.3)])
def test_one_sampled_release_has_a_closed_form(z: float, q: float) -> None:
    """(1 - q) N(0, z²) + q N(1, z²) against N(0, z²), both ways round."""
    delta = 1e-5

    def over(e: float) -> float:
        t = z * z * math.log((math.exp(e) - 1 + q) / q) + 0.5
        removed = (1 - q - math.exp(e)) * norm.sf(t / z) + q * norm.sf((t - 1) / z)
        added = 0.0
        if math.exp(-e) > 1 - q:
            t = z * z * math.log((math.exp(-e) - 1 + q) / q) + 0.5
            added = (1 - math.exp(e) * (1 - q)) * norm.cdf(t / z)
            added -= math.exp(e) * q * norm.cdf((t - 1) / z)
        return float(max(removed, added)) - delta

    wanted = brentq(over, 1e-9, 50)
    found = epsilon([Release(z, q)], delta)
    assert wanted - 1e-6 <= found <= wanted * (1 + 1e-3)


@settings(max_examples=4, deadline=None)
@given(
    z=st.floats(0.7, 6.0), q=st.floats(0.005, 0.5), steps=st.integers(1, 60), e=st.integers(3, 7)
)
def test_more_steps_a_larger_part_and_less_noise_cost_more(
    z: float, q: float, steps: int, e: int
) -> None:
    delta = 10.0**-e
    here = epsilon([Release(z, q, steps)], delta)
    for more in (Release(z, q, 2 * steps), Release(z, 1.5 * q, steps), Release(z / 1.2, q, steps)):
        assert epsilon([more], delta) > here
    assert epsilon([Release(z, q, steps)], delta / 10) > here
    assert here <= epsilon([Release(z, 1.0, steps)], delta)


@given(st.lists(st.tuples(st.floats(0.3, 30), st.integers(1, 50)), min_size=1, max_size=5))
def test_gaussian_releases_add_up(parts: list[tuple[float, int]]) -> None:
    """Whatever their order and noise: 1/z² adds up."""
    releases = [Release(z, 1.0, n) for z, n in parts]
    mu = math.sqrt(sum(n / z**2 for z, n in parts))
    assert epsilon(releases, 1e-5) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-9)
    assert epsilon(reversed(releases), 1e-5) == epsilon(releases, 1e-5)


def test_releases_of_different_kinds() -> None:
    """Together they cost more than each alone and less than their sum; opacus agrees."""
    many_and_few = [Release(50.0, 0.5, 5000), Release(0.8, 0.01, 1)]
    assert epsilon(many_and_few, 1e-5) >= epsilon(many_and_few[:1], 1e-5)
    kinds = [Release(1.0, 0.05, 60), Release(2.0, 0.2, 30), Release(6.0, 1.0, 3)]
    found = epsilon(kinds, 1e-5)
    opinions = second_opinions(kinds, 1e-5)
    assert max(epsilon([k], 1e-5) for k in kinds) < found < sum(epsilon([k], 1e-5) for k in kinds)
    assert found - 2e-3 <= opinions["PRV"] <= found + 0.0105
    assert opinions["RDP"] >= found
    assert found == epsilon(reversed(kinds), 1e-5)


def test_it_does_not_matter_how_releases_are_listed() -> None:
    apart = [Release(1.0, 0.1, n) for n in (3, 0, 4)]
    assert epsilon(apart, 1e-5) == epsilon([Release(1.0, 0.1, 7)], 1e-5)
    assert epsilon([*apart, Release(1.0, 0.0, 9)], 1e-5) == epsilon(apart, 1e-5)
    assert epsilon([], 1e-5) == 0
    assert second_opinions([], 1e-5) == {"RDP": 0, "PRV": 0}


@pytest.mark.parametrize("q", [0.1, 1.0])
def test_without_noise_everything_is_told(q: float) -> None:
    releases = [Release(1.0, q, 5), Release(0.0, q)]
    assert epsilon(releases, 1e-5) == math.inf
    assert second_opinions(releases, 1e-5) == {"RDP": math.inf}


def test_hopeless_epsilons_are_quick() -> None:
    """A PLD of these would take minutes and gigabytes."""
    hopeless = [Release(0.05, 0.5, 1000)]
    assert epsilon(hopeless, 1e-5) > 1e5
    assert second_opinions(hopeless, 1e-5).keys() == {"RDP"}
    assert epsilon([Release(1e-200, 1.0)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("budget", "q", "count", "z"),
    [
        (1.0, 0.01, 1000, 1.4147),
        (3.0, 0.01, 1000, 0.8136),
        (8.0, 0.01, 1000, 0.5863),
        (8.0, 0.1, 100, 0.9360),
        (8.0, 1.0, 50, 4.2451),
        (0.5, 0.2, 10, None),
    ],
)
def test_calibration(budget: float, q: float, count: int, z: float | None) -> None:
    """The noise for a budget keeps it, and a thousandth less does not."""
    found = calibrate(budget, 1e-5, count, q)
    if z is not None:
        assert found == pytest.approx(z, rel=1e-3)
    assert epsilon([Release(found, q, count)], 1e-5) <= budget
    assert epsilon([Release(found * (1 - 1.5e-3), q, count)], 1e-5) > budget


def test_calibration_of_a_budget_that_needs_no_noise_to_speak_of() -> None:
    assert 0 < calibrate(1e9, 1e-5, 1, 1.0) <= 1e-3


@pytest.mark.parametrize("q", [1.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 1e-200, 1e-7])
def test_hardly_any_noise_is_none(z: float, q: float) -> None:
    assert epsilon([Release(z, q, 3)], 1e-5) == math.inf
    assert second_opinions([Release(z, q, 3)], 1e-5) == {"RDP": math.inf}
