import math
from dataclasses import replace
from typing import Any

import pytest

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
        "points": points,
        "accuracy": 0.5,
        "own_loss": losses[-1] + 1,
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
        {"label": name, "personal": g[0].personal, "trainers": ["first_order"]}
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


def test_an_order_is_claimed_only_with_intervals_apart_and_a_small_p() -> None:
    def runs(method: str, *finals: float) -> list[Cell]:
        return [cell(method, seed, [4.0, loss]) for seed, loss in enumerate(finals)]

    first = runs("first", 2.00, 2.01, 2.02)
    clear, near = runs("clear", 1.00, 1.01, 1.021), runs("near", 1.99, 2.03, 2.00)
    rows = {row["label"]: row for row in compared(first, clear, near)["held_out"]["rows"]}
    assert rows["clear"]["verdict"] == "lower"
    assert rows["clear"]["difference"]["mean"] == pytest.approx(-0.99967, abs=1e-5)
    assert rows["clear"]["p_holm"] == pytest.approx(2 * rows["clear"]["p"])
    assert rows["near"]["verdict"] is None
    # Paired, the difference is sure; the intervals overlap, so no order is claimed.
    wide = runs("first", 1.0, 2.0, 3.0)
    shifted = runs("shifted", 0.9, 1.9, 2.9001)
    row = compared(wide, shifted)["held_out"]["rows"][0]
    assert row["p_holm"] < 0.001
    assert (row["intervals_apart"], row["verdict"]) == (False, None)


def test_one_seed_allows_no_claim() -> None:
    found = compared([cell("a", 0, [4, 1])], [cell("b", 0, [4, 3])])
    assert found["methods"][0]["loss"] == {"mean": 1.0, "low": None, "high": None, "n": 1}
    row = found["held_out"]["rows"][0]
    assert (row["p"], row["verdict"], row["difference"]["mean"]) == (None, None, 2.0)


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
