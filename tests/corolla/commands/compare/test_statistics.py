import math
from statistics import stdev

import pytest

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


def test_one_value_has_no_interval_and_is_apart_from_nothing() -> None:
    one = statistics.mean([5.0])
    assert (one.mean, one.low, one.high) == (5.0, None, None)
    assert not one.apart_from(statistics.mean([1.0, 1.0]))
    assert not statistics.mean([1.0, 1.0]).apart_from(one)


def test_intervals_are_apart_only_without_a_common_point() -> None:
    def reaching(low: float, high: float) -> statistics.Mean:
        return statistics.Mean((low + high) / 2, low, high, 3)

    assert reaching(0, 1).apart_from(reaching(2, 3))
    assert reaching(2, 3).apart_from(reaching(0, 1))
    assert not reaching(0, 2).apart_from(reaching(2, 3))
    assert not reaching(0, 9).apart_from(reaching(2, 3))


def test_paired_p_by_hand() -> None:
    # t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom: 1 - t / sqrt(2 + t²)
    assert statistics.p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - 3.4641016 / math.sqrt(14))
    assert statistics.p_value([-1.0, -2.0, -3.0]) == statistics.p_value([1.0, 2.0, 3.0])
    assert statistics.p_value([0.0, 0.0]) == 1
    assert statistics.p_value([1.0, 1.0]) == 0


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls() -> None:
    assert statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"b": 0.03, "c": 0.06, "a": 0.06}
    )
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert statistics.holm({}) == {}
