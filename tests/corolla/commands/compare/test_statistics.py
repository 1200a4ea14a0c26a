import math
from statistics import stdev

import numpy as np
import pytest
from scipy import stats

from corolla.commands.compare import statistics

# The table of every textbook: df → t with 95 % of the probability between -t and t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}


@pytest.mark.parametrize(("df", "t"), TABLE.items())
def test_intervals_reach_as_far_as_the_table_says(df: int, t: float) -> None:
    values = [0.0] * df + [1.0]
    found = statistics.mean(values)
    assert found.high is not None
    error = stdev(values) / math.sqrt(df + 1)
    assert (found.high - found.mean) / error == pytest.approx(t, abs=5e-4)


def test_an_interval_computed_by_hand() -> None:
    # 1, 2, 3: mean 2, standard deviation 1, 4.303 / sqrt(3) = 2.484
    found = statistics.mean([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(-0.484, abs=1e-3)
    assert found.high == pytest.approx(4.484, abs=1e-3)


def test_one_value_has_no_interval() -> None:
    one = statistics.mean([5.0])
    assert (one.mean, one.low, one.high) == (5.0, None, None)


def test_paired_p_by_hand() -> None:
    # t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom: 1 - t / sqrt(2 + t²)
    assert statistics.p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - 3.4641016 / math.sqrt(14))
    assert statistics.p_value([-1.0, -2.0, -3.0]) == statistics.p_value([1.0, 2.0, 3.0])
    assert statistics.p_value([0.0, 0.0]) == 1
    assert statistics.p_value([1.0, 1.0]) == 0


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_p_is_that_of_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    first, second = rng.normal(3.0, 1.0, n), rng.normal(3.2, 1.0, n)
    found = statistics.p_value((second - first).tolist())
    assert found == pytest.approx(float(stats.ttest_rel(second, first).pvalue), rel=1e-9)


def test_holm_on_the_example_of_the_encyclopaedia() -> None:
    """p of 0.01, 0.04, 0.03, 0.005 at 0.05: H4 and H1 are rejected, H3 and H2 are not.

    Wikipedia, "Holm–Bonferroni method", Example.
    """
    found = statistics.holm({"H1": 0.01, "H2": 0.04, "H3": 0.03, "H4": 0.005})
    assert found == pytest.approx({"H4": 0.02, "H1": 0.03, "H3": 0.06, "H2": 0.06})
    assert {name for name, p in found.items() if p <= 0.05} == {"H4", "H1"}


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls() -> None:
    assert statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"b": 0.03, "c": 0.06, "a": 0.06}
    )
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert statistics.holm({}) == {}
