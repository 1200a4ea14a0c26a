import math
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from corolla.commands.compare.cells import Cell, Point
from corolla.commands.compare.results import best_lr, edge, interpolate, results, unequal


def cell(method: str, seed: int, losses: list[float], step: float = 100.0, **changes: Any) -> Cell:
    """A run whose rounds cost `step` bytes and a tenth of that in seconds."""
    points = [Point(r, r * step, r * step / 10, loss) for r, loss in enumerate(losses)]
    values: dict[str, Any] = {
        "method": method,
        "lr": 0.1,
        "seed": seed,
        "personal": False,
        "pooled": False,
        "points": points,
        "accuracy": 0.5,
        "own_loss": losses[-1] + 1,
        "choosing_loss": losses[-1] + 2,
        "peak_rss": 1000,
        "bytes_up": 1.0,
        "bytes_down": 2.0,
        "dropped": 0,
        "simulated": False,
        "evidence": {"model": "m", "cohorts": ["a", "b"]},
        "work": ["first_order", 10],
        "tokens": [7.0, 9.0],
    }
    return Cell(**{**values, **changes})


def compared(*groups: list[Cell]) -> dict[str, Any]:
    finals = {group[0].method: group for group in groups}
    methods = [
        {
            **{"label": name, "personal": g[0].personal, "trainers": ["first_order"]},
            "baseline": "global" if g[0].pooled else None,
        }
        for name, g in finals.items()
    ]
    return results(methods, {name: {0.1: 1.0} for name in finals}, finals)


def test_who_works_alike_must_read_the_same_tokens() -> None:
    first, other = cell("a", 0, [2, 1]), cell("b", 0, [2, 1], tokens=[7.0, 8.0])
    assert unequal([first, other]) == [
        "seed 0: tokens trained on of b and a differ, though both work alike"
    ]
    assert unequal([first, replace(other, work=["zeroth_order", 10])]) == []
    assert unequal([first, replace(other, seed=1)]) == []


def test_interpolation_on_straight_lines() -> None:
    points = [Point(0, 0, 0, 5.0), Point(1, 100, 1, 3.0), Point(2, 300, 2, 2.0)]
    for at, loss, within in (
        (0, 5.0, True),
        (50, 4.0, True),
        (100, 3.0, False),
        (200, 2.5, False),
        (300, 2.0, False),
        (999, 2.0, False),
    ):
        assert interpolate(points, lambda point: point.bytes, at) == (loss, within)


def test_the_best_learning_rate_and_whether_it_is_at_the_edge() -> None:
    assert best_lr({0.1: 3.0, 0.3: 2.0, 0.9: None}) == 0.3
    assert best_lr({0.1: math.nan, 0.3: math.inf, 0.9: 5.0}) == 0.9
    assert best_lr({0.3: 2.0, 0.1: 2.0}) == 0.1
    assert best_lr({0.1: None}) is None
    assert edge({0.3: 2.0, 0.1: 3.0, 0.9: 2.5}) is None
    assert edge({0.3: 2.0, 0.1: 1.0, 0.9: 2.5}) == "lowest"
    assert edge({0.3: 2.0, 0.1: 3.0, 0.9: 1.5}) == "highest"
    assert edge({0.3: 2.0}) is None
    assert edge({0.3: None, 0.1: None}) is None


def test_equal_bytes_are_the_least_total_and_means_are_over_seeds() -> None:
    dear = [cell("dear", s, [4.0, 2.0 + s, 1.0]) for s in (0, 1)]
    cheap = [cell("cheap", s, [4.0, 3.0, 2.0], step=25) for s in (0, 1)]
    found = compared(dear, cheap)
    assert found["budgets"] == {"bytes": 50, "seconds": 5}
    first, second = found["methods"]
    assert first["at_bytes"]["mean"] == pytest.approx((3.0 + 3.5) / 2)  # half of round 1
    assert first["at_bytes"]["within_first_round"]
    assert second["at_bytes"]["mean"] == 2.0
    assert not second["at_bytes"]["within_first_round"]
    assert first["loss"]["mean"] == 1.0
    assert [point["loss"] for point in first["curve"]] == [4.0, 2.5, 1.0]
    assert (first["curve"][1]["low"], first["curve"][1]["high"]) == (2.0, 3.0)
    assert found["pareto"] == ["cheap", "dear"]


def test_who_is_beaten_in_both_is_not_on_the_front() -> None:
    found = compared(
        [cell("a", 0, [4, 2])], [cell("b", 0, [4, 3], step=200)], [cell("c", 0, [4, 1], step=300)]
    )
    assert found["pareto"] == ["a", "c"]


def runs(method: str, *finals: float, **changes: Any) -> list[Cell]:
    return [cell(method, seed, [4.0, loss], **changes) for seed, loss in enumerate(finals)]


def test_the_verdict_is_that_of_the_paired_test_with_holms_correction() -> None:
    first = runs("first", 2.00, 2.01, 2.02)
    clear, near = runs("clear", 1.00, 1.01, 1.021), runs("near", 1.99, 2.03, 2.00)
    rows = {row["label"]: row for row in compared(first, clear, near)["held_out"]["rows"]}
    assert rows["clear"]["verdict"] == "lower"
    assert rows["clear"]["difference"]["mean"] == pytest.approx(-0.99967, abs=1e-5)
    assert rows["clear"]["p_holm"] == pytest.approx(2 * rows["clear"]["p"])
    wanted = stats.ttest_rel([1.00, 1.01, 1.021], [2.00, 2.01, 2.02]).pvalue
    assert rows["clear"]["p"] == pytest.approx(wanted, rel=1e-9)
    assert rows["near"]["verdict"] == "no difference"
    # Paired, the difference is sure, however far apart the seeds are.
    wide, shifted = runs("first", 1.0, 2.0, 3.0), runs("shifted", 1.1, 2.1, 3.0999)
    (row,) = compared(wide, shifted)["held_out"]["rows"]
    assert row["p_holm"] < 0.001
    assert row["verdict"] == "higher"


def test_a_difference_that_holm_takes_back_is_none() -> None:
    """p of about 0.03 alone is not 0.06 of two."""
    first, other = runs("first", 2.00, 2.00, 2.00), runs("other", 1.9, 1.93, 1.86)
    (alone,) = compared(first, other)["held_out"]["rows"]
    assert 0.025 < alone["p"] < 0.05 and alone["verdict"] == "lower"
    beside = compared(first, other, runs("third", 2.1, 1.8, 2.0))["held_out"]["rows"]
    assert [row["verdict"] for row in beside] == ["no difference"] * 2
    assert beside[0]["p"] == alone["p"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_not_judged(seeds: int) -> None:
    found = compared(runs("a", *[1.0, 1.1][:seeds]), runs("b", *[3.0, 3.1001][:seeds]))
    (row,) = found["held_out"]["rows"]
    assert (row["p"], row["p_holm"], row["verdict"]) == (None, None, "not judged")
    assert row["difference"]["mean"] == pytest.approx(2.0, abs=1e-3)
    assert found["methods"][0]["loss"]["n"] == seeds


def test_contenders_that_differ_in_nothing_are_exactly_equal() -> None:
    found = compared(runs("a", 1.1, 1.2, 1.3), runs("b", 1.1, 1.2, 1.3))
    (row,) = found["held_out"]["rows"]
    assert (row["difference"]["mean"], row["p"], row["verdict"]) == (0.0, 1.0, "no difference")


def test_one_client_with_all_rows_has_a_loss_and_no_price() -> None:
    apart = {"evidence": {"model": "m", "cohorts": ["x"]}, "pooled": True, "tokens": [99.0, 99.0]}
    whole = runs("global", 1.0, 1.1, 1.2, step=1.0, **apart, own_loss=None)
    found = compared(runs("a", 2.0, 2.1, 2.2), runs("b", 3.0, 3.1, 3.2), whole)
    assert found["unequal"] == []
    assert found["budgets"]["bytes"] == 100  # not what a client sends that need not send
    assert found["pareto"] == ["a"]
    entry = found["methods"][2]
    assert (entry["at_bytes"], entry["at_seconds"], entry["own_loss"]) == (None, None, None)
    assert [row["label"] for row in found["held_out"]["rows"]] == ["b", "global"]
    assert [row["label"] for row in found["own"]["rows"]] == ["b"]
    other = [replace(c, evidence={**c.evidence, "model": "other"}) for c in whole]
    assert unequal([*runs("a", 2.0, 2.1, 2.2), *other])


def test_differences_are_paired_by_seed() -> None:
    first = [cell("a", seed, [9.0, float(seed)]) for seed in (0, 1, 2)]
    second = [cell("b", seed, [9.0, seed + 0.5]) for seed in (2, 1)]  # seed 0 has failed
    row = compared(first, second)["held_out"]["rows"][0]
    assert (row["difference"]["mean"], row["difference"]["n"]) == (0.5, 2)


def test_personal_losses_never_stand_beside_held_out_ones() -> None:
    found = compared(
        [cell("own", 0, [4, 1], step=1, personal=True)],
        [cell("a", 0, [4, 2])],
        [cell("b", 0, [4, 3])],
    )
    own, shared, _ = found["methods"]
    assert own["loss"] is own["accuracy"] is own["at_bytes"] is own["at_seconds"] is None
    assert own["own_loss"]["mean"] == 2.0
    assert shared["loss"]["mean"] == 2.0
    assert found["budgets"]["bytes"] == 100  # what the personal one sent is no budget
    assert found["held_out"]["reference"] == "a"
    assert [row["label"] for row in found["held_out"]["rows"]] == ["b"]
    assert found["own"]["reference"] == "own"
    assert "own" not in found["pareto"]


def test_the_largest_epsilon_of_all_seeds_is_told() -> None:
    own = [cell("fedavg", seed, [5.0, 4.0], epsilon=1.0 + seed, own_loss=None) for seed in (0, 1)]
    found = compared(own, [cell("plain", 0, [5.0, 4.0])])
    assert [entry["epsilon"] for entry in found["methods"]] == [2.0, None]
