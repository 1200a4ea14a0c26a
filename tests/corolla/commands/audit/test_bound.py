"""The bound of Steinke, Nasr and Jagielski (2305.08846), its guesses, and the membership attack."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from scipy.stats import binomtest

from corolla.commands.audit import bound, membership

# (canaries, guesses, right) → lower bounds at delta = 1e-5 and at 0, 95 % confidence.
ANCHORS = {
    (100, 100, 100): (3.4902, 3.4930),
    (1000, 100, 100): (3.4654, 3.4930),
    (1000, 100, 95): (2.1652, 2.1724),
    (1000, 1000, 600): (0.2972, 0.2975),
    (1000, 1000, 750): (0.9764, 0.9767),
    (5000, 500, 490): (3.3357, 3.3563),
    (100, 20, 20): (1.8196, 1.8227),
    (100, 10, 10): (1.0482, 1.0519),
}


@pytest.mark.parametrize("numbers", ANCHORS)
def test_anchors(numbers: tuple[int, int, int]) -> None:
    with_delta, without = ANCHORS[numbers]
    assert bound.lower_bound(*numbers, 1e-5) == pytest.approx(with_delta, abs=1e-3)
    assert bound.lower_bound(*numbers, 0.0) == pytest.approx(without, abs=1e-3)


def test_perfect_guessing_of_a_hundred_caps_at_3_49() -> None:
    assert bound.ceiling(100, 100, 1e-5) == pytest.approx(3.49, abs=5e-3)


@pytest.mark.parametrize("right", [60, 75, 99, 100])
def test_without_delta_it_is_the_interval_of_a_binomial(right: int) -> None:
    low = binomtest(right, 100, alternative="greater").proportion_ci(0.95).low
    wanted = max(0.0, math.log(low / (1 - low)))
    assert bound.lower_bound(100, 100, right, 0.0) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("m", "r", "v"), [(3, 3, 3), (9, 5, 4), (20, 8, 1), (6, 6, 0)])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.02])
def test_p_value_by_exact_fractions(m: int, r: int, v: int, delta: float) -> None:
    """Theorem 5.2 term by term, e^ε = 3 so that q = 3/4."""
    q = Fraction(3, 4)

    def f(least: int) -> Fraction:
        terms = range(max(0, least), r + 1)
        return sum((math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in terms), Fraction())

    slope = max((Fraction(f(v - i) - f(v)) / i for i in range(1, m + 1)), default=Fraction())
    wanted = min(1.0, float(f(v)) + 2 * m * delta * float(max(slope, Fraction())))
    assert bound.p_value(m, r, v, math.log(3), delta) == pytest.approx(wanted, rel=1e-9)


def test_randomised_response_is_hardly_ever_refuted() -> None:
    """Right with probability e^ε / (1 + e^ε): the tightest mechanism that is ε-DP."""
    epsilon, canaries, tries = 1.0, 200, 2000
    q = 1 / (1 + math.exp(-epsilon))
    rng = random.Random(0)
    rights = [sum(rng.random() < q for _ in range(canaries)) for _ in range(tries)]
    bounds = {v: bound.lower_bound(canaries, canaries, v, 1e-5) for v in set(rights)}
    false_alarms = sum(bounds[v] > epsilon for v in rights) / tries
    assert false_alarms <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)
    assert false_alarms > 0.01  # it is a bound of 95 %, not one that never speaks


def test_monotone_in_what_is_right_in_delta_and_in_confidence() -> None:
    bounds = [bound.lower_bound(500, 100, v, 1e-5) for v in range(101)]
    assert bounds == sorted(bounds)
    assert bounds[50] == 0.0
    assert bounds[100] < bound.lower_bound(500, 100, 100, 1e-6)
    assert bounds[100] > bound.lower_bound(500, 100, 100, 1e-5, confidence=0.99)


def test_a_large_delta_proves_nothing() -> None:
    assert bound.lower_bound(1000, 10, 10, 0.05) == 0.0


def test_impossible_counts_are_refused() -> None:
    for numbers in ((10, 5, 6), (10, 11, 3), (10, 5, -1)):
        with pytest.raises(ValueError, match="right of"):
            bound.lower_bound(*numbers, 1e-5)


def test_guesses_are_the_ends_of_the_order() -> None:
    scores = [0.1, 5.0, -3.0, 2.0, 0.0, math.nan]
    included = [True, True, False, False, True, False]
    assert bound.right_guesses(scores, included, 2) == 2  # 5.0 is in, NaN is out
    assert bound.right_guesses(scores, included, 4) == 3  # 2.0 is not in
    assert bound.right_guesses(scores, included, 3) == 2  # one more "in" than "out"
    with pytest.raises(ValueError, match="guesses"):
        bound.right_guesses(scores, included, 7)


def test_auc_counts_pairs_and_half_of_ties() -> None:
    members, others = [3.0, 2.0, 2.0, 0.5], [2.0, 1.0, 0.5]
    wins = sum(
        1.0 if m > o else 0.5 if m == o else 0.0 for m, o in itertools.product(members, others)
    )
    assert wins == 8.5
    assert membership.auc(members, others) == pytest.approx(wins / 12)
    assert membership.auc([1.0, 1.0], [1.0]) == 0.5
    assert membership.auc([2.0], [1.0]) == 1.0


def test_true_positives_at_a_false_positive_rate() -> None:
    others = [float(i) for i in range(200)]  # at most 2 may pass: the threshold is 197
    members = [197.0, 197.5, 198.0, 250.0, 0.0]
    assert membership.true_positives(members, others, 0.01) == 3 / 5
    assert membership.true_positives(members, others[:50], 0.01) == 4 / 5  # none may pass 49


def test_an_attack_needs_both_kinds() -> None:
    found = membership.attack([1.0, 2.0], [0.0])
    assert (found.auc, found.tpr_at_1_fpr, found.members, found.others) == (1.0, 1.0, 2, 1)
    with pytest.raises(ValueError, match="0 others"):
        membership.attack([1.0], [])
