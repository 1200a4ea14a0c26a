"""The bench of starts sets CPU seconds in relation, and holds seconds by the clock against bars."""

import sys
from collections.abc import Sequence

import pytest

from experiments.bench import starting as bench
from experiments.bench.zeroth_order import Took


def test_ratios_are_of_the_libraries_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Sequence[str]] = []

    def process(words: Sequence[str]) -> Took:
        begun.append(words)
        return Took(0.4, 2.0) if "-m" in words else Took(9.0, 8.0)

    monkeypatch.setattr(bench, "process", process)
    section = bench.starting(bench.Options(repetitions=2))
    rows = {str(row["number"]).partition(" / ")[0]: row for row in section.ratios}
    assert {name: row["met"] for name, row in rows.items() if name in bench.BARS} == {
        "--version": False,
        "--help": True,
        "simulate, to the first task": False,
    }
    assert rows["plan"]["measured"] == pytest.approx(2.0 / 8.0)
    assert rows["plan"]["met"] is None
    assert len(begun) == 3 * len(section.rows)


def test_a_process_is_measured_and_a_failure_is_said() -> None:
    wall, cpu = bench.process([sys.executable, "-S", "-c", "sum(range(10**6))"])
    assert cpu > 0
    assert wall > 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        bench.process([sys.executable, "-S", "-c", "import sys; sys.exit(3)"])
