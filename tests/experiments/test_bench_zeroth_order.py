"""The benchmark runs and reports what it promises. No number of it is judged here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from corolla.directions import signs
from experiments.bench import zeroth_order as bench

SMALL = "--threads 1 --repetitions 2 --signs 4096 --values 10000 --pool 64 --gaussians 1".split()
SMALL += "--batch 2 --length 16 --rank 2".split()


@pytest.fixture
def options(tiny_model: Path) -> bench.Options:
    return bench.Options(
        str(tiny_model), threads=1, repetitions=2, pool=64, batch=2, length=16, rank=2
    )


def sound(section: dict[str, Any]) -> None:
    assert section["rows"]
    assert section["ratios"]
    for row in section["ratios"]:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert numbers
        assert all(math.isfinite(value) and value > 0 for value in numbers), row


def test_all_numbers_are_written(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "bench.json"
    chosen = ["generator", "replay", "step", "--model", str(tiny_model), "--json", str(file)]
    assert bench.main([*chosen, *SMALL]) == 0
    found = json.loads(file.read_text())
    assert found["machine"].keys() >= {"cpu", "cores", "memory_gb", "threads", "torch", "date"}
    assert found["options"]["values"] == 10000
    assert list(found["sections"]) == ["generator", "replay", "step"]
    for section in found["sections"].values():
        sound(section)
    names = {row["contender"] for row in found["sections"]["step"]["rows"]}
    for kind in ("full", "lora"):
        for name in ("two forward passes", "zeroth-order step", "MeZO step"):
            assert f"{kind}: {name}" in names
    bars = {row["ratio"]: row["bar"] for row in found["sections"]["step"]["ratios"]}
    assert bars["full: step / two forward passes"] == "≤ 1.25"
    assert bars["lora: step / two forward passes"] == "≤ 1.03"
    drawn = [note for note in found["sections"]["replay"]["notes"] if "extrapolated" in note]
    assert drawn == ["Gaussian, 64 directions: extrapolated from 2 that were drawn and added"]


def test_memory_of_all_contenders_beside_inference(options: bench.Options) -> None:
    found = bench.memory(options, measure=bench.memory_of)
    assert [row["process"] for row in found.rows] == list(bench.MEMORY)
    sound({"rows": found.rows, "ratios": found.ratios})


def test_memory_is_measured_in_a_process_of_its_own(options: bench.Options) -> None:
    found = bench.in_child("full", options)
    assert 0 < found["model loaded"] <= found["peak with loading"]
    assert found["peak"] > 0


def test_the_kernel_is_back_after_numpy() -> None:
    before = signs.compiled()
    with bench.without_kernel():
        assert not signs.compiled()
    assert signs.compiled() == before


def test_a_generator_that_is_not_philox_is_refused() -> None:
    with pytest.raises(ValueError, match="no Philox4x32-10"):
        bench.check_known_answers("wrong", lambda *given: bench.numpy_philox_32(*given) + 1, 32)


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "known are generator, replay, step, memory" in capsys.readouterr().err
