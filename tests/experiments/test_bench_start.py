"""The bench of starts measures up to the first task, and holds its numbers against the bars."""

import json
from pathlib import Path

import pytest

from experiments.bench import start as bench


def test_a_process_is_measured_until_the_first_task_is_sent(
    tmp_path: Path, tiny_model: Path
) -> None:
    few = {"rows": 80, "clients": 4, "characters": 60, "length": 64}
    options = bench.Options(**few, model=str(tiny_model), folder=str(tmp_path))
    bench.write(tmp_path / "rows.jsonl", options)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    assert {row["client_id"] for row in rows} == {"c0000", "c0001", "c0002", "c0003"}
    assert {len(row["prompt"] + row["response"]) for row in rows} == {60}
    found = bench.begin("begin", options)
    assert found["cpu"] > 0
    assert found["peak"] > 1e8
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bars_are_of_the_worse_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(folder: Path, options: bench.Options) -> bench.Measured:
        (folder / "kept").mkdir(exist_ok=True)
        (folder / "kept" / "rows").write_bytes(bytes(100))
        return {"wall": 99.0, "cpu": 20.0, "peak": 1.6e9}

    monkeypatch.setattr(bench, "_begun", begun)
    found = bench.start(bench.Options(4, 2, folder=str(tmp_path)))
    met = {row["number"]: row["met"] for row in found.ratios}
    assert met == {
        "first start, s": True,
        "second start, s": False,
        "peak, MB": False,
        "kept / file": True,
    }
    assert not list(tmp_path.iterdir())
