"""The benchmark runs and reports what it promises. No number of it is judged here."""

import json
import math
from pathlib import Path

import pytest

from corolla.estimates import footprint
from experiments.bench import memory as bench


@pytest.fixture
def options(tiny_model: Path) -> bench.Options:
    return bench.Options(str(tiny_model), batch=4, length=16, rank=2, steps=1)


def test_every_case_has_a_prediction_and_a_measurement(options: bench.Options) -> None:
    found = bench.clients(options, measure=bench.memory_of)
    assert [row["case"] for row in found.rows] == list(bench.CASES)
    for row in found.rows:
        assert all(float(row[how]) > 100 for how in ("predicted", "measured")), row
    for ratio in found.ratios:
        apart = ratio["predicted / measured - 1"]
        assert isinstance(apart, float) and math.isfinite(apart)
        assert ratio["met"] == (abs(apart) <= 0.2)


def test_cases_by_number(options: bench.Options) -> None:
    asked: list[str] = []

    def measure(name: str, given: bench.Options) -> bench.Measured:
        asked.append(name)
        return {"measured": 10.0, "predicted": 13.0}

    few = bench.Options(**{**vars(options), "cases": "1,7"})
    found = bench.clients(few, measure=measure)
    assert asked == ["first order", "zeroth order"]
    assert found.ratios[0]["met"] is False
    assert found.ratios[0]["predicted / measured - 1"] == pytest.approx(0.3)


def test_constants_and_a_file_of_all_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: bench.Options
) -> None:
    file = tmp_path / "bench.json"
    here = {"constants": lambda given: bench.constants(given, measure=bench.memory_of)}
    monkeypatch.setattr(bench, "SECTIONS", here)
    small = "--batch 4 --length 16 --rank 2 --steps 1".split()
    assert bench.main(["constants", "--model", options.model, "--json", str(file), *small]) == 0
    found = json.loads(file.read_text())
    rows = found["sections"]["constants"]["rows"]
    names = [row["case"].partition(",")[0] for row in rows]
    assert names == ["LIBRARIES", "TOKENIZER", "HEAP", "WORK"]
    assert rows[0]["measured"] > 200
    assert found["machine"].keys() >= {"cpu", "memory_gb", "torch", "date"}


def test_heap_and_work_are_a_line_through_two_cases() -> None:
    """Processes made up to take 100 + 7 + 3 bytes for each byte of activations and logits."""
    two = []
    for needed in (10.0, 50.0):
        counted = footprint.HEAP * needed
        terms = {"activations": 0.75 * counted, "logits": 0.25 * counted}
        predicted = 100 + footprint.WORK + counted
        two.append({"terms": terms, "predicted": predicted, "measured": 107 + 3 * needed})
    heap, work = bench._heap(two)
    assert heap == pytest.approx(3)
    assert work == pytest.approx(7, abs=1e-3)
