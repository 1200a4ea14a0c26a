"""The bench of a step trains the same by both ways, and reports what it promises."""

from pathlib import Path

import pytest

from experiments.bench import step as bench


@pytest.fixture
def options(tiny_model: Path) -> bench.Options:
    return bench.Options(str(tiny_model), repetitions=1, batch=2, length=24, rank=2, steps=1)


def test_contenders_start_alike_and_have_ratios(options: bench.Options) -> None:
    found = bench.step(options, measure=bench.measured)
    assert [row["contender"] for row in found.rows] == list(bench.CONTENDERS)
    assert [ratio["bar"] for ratio in found.ratios] == ["≥ 2", "≤ 0.25"]
    assert "commit" in found.notes[0]


def test_other_work_is_not_compared(options: bench.Options) -> None:
    losses = iter((4.0, 4.1))

    def measure(name: str, given: bench.Options) -> bench.Measured:
        return {"took": [(1.0, 1.0)], "loss": next(losses), "bytes": 1.0, "tokens": 8}

    with pytest.raises(ValueError, match="do not train the same"):
        bench.step(options, measure=measure)
