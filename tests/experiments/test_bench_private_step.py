"""The benchmark runs and reports what it promises. No time of it is judged here."""

import json
import math
from pathlib import Path

import pytest

from experiments.bench import private_step as bench


@pytest.mark.parametrize("section", ["lora", "full"])
def test_all_numbers_are_written(tmp_path: Path, tiny_model: Path, section: str) -> None:
    file = tmp_path / "bench.json"
    small = "--threads 1 --repetitions 1 --steps 1 --batch 2 --length 8 --rank 2".split()
    arguments = [section, "--model", str(tiny_model), "--json", str(file), *small]
    assert bench.main(arguments) == 0
    found = json.loads(file.read_text())["sections"][section]
    names = {row["contender"] for row in found["rows"]}
    assert names >= {"plain step", "private step", "noise alone"}
    bars = {row["ratio"]: row["bar"] for row in found["ratios"]}
    assert bars["private step / plain step"] == ("≤ 1.7" if section == "lora" else "")
    assert all(math.isfinite(row["median"]) and row["median"] > 0 for row in found["ratios"])
