from typing import Any

import pytest

from corolla.config.run import RunConfig
from corolla.server.runs.ending import ended


def lines(*losses: float | None) -> list[dict[str, Any]]:
    return [{"round": i, "eval_loss": loss} for i, loss in enumerate(losses, start=1)]


def end(*losses: float | None, seconds: float = 0.0, **settings: Any) -> str:
    """Of a run of ten rounds whose base model has a loss of 3."""
    return ended(RunConfig(**{"rounds": 10, **settings}), 3.0, lines(*losses), seconds)


def test_a_run_without_conditions_ends_after_its_rounds() -> None:
    assert end(*[2.0] * 9) == ""
    assert end(*[2.0] * 10) == "all 10 rounds"


def test_there_is_always_a_first_round() -> None:
    assert end(seconds=1e9, max_seconds=1.0, target_loss=100.0, patience=1) == ""


@pytest.mark.parametrize(
    ("losses", "reached"),
    [((2.5,), False), ((2.0,), True), ((1.9,), True), ((1.9, 2.5), False), ((2.5, None), False)],
)
def test_the_last_loss_decides_whether_the_target_is_reached(
    losses: tuple[float | None, ...], reached: bool
) -> None:
    assert ("target-loss 2 reached" in end(*losses, target_loss=2.0)) == reached


def test_a_round_without_an_evaluation_keeps_a_reached_target() -> None:
    """As when a process died between that round and the end."""
    assert "held-out loss 1.5000" in end(1.5, None, target_loss=2.0)


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ((2.9, 2.8, 2.7), False),
        ((2.9, 2.8, 2.9), False),
        ((2.9, 2.8, 2.9, 2.8), True),  # as low is not lower
        ((2.9, None, 2.9, None, 2.95), True),
        ((3.1,), False),
        ((3.1, 3.05), True),  # never better than the base model
        ((3.1, 2.9, 2.95), False),
    ],
)
def test_patience_counts_evaluations_since_the_lowest_loss(
    losses: tuple[float | None, ...], over: bool
) -> None:
    assert ("2 evaluations without a lower" in end(*losses, patience=2)) == over


def test_time_is_over() -> None:
    assert end(2.0, seconds=59.9, max_seconds=60) == ""
    assert end(2.0, seconds=60.0, max_seconds=60) == "max-seconds 60 are over"
