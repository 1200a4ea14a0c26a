"""The experiment on what is trained: its settings hold, its table and pairs follow its lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from corolla.config.build import build_strategy
from experiments.trained import run


def test_every_trial_is_a_run_and_no_public_row_is_a_clients(tmp_path: Path) -> None:
    for model, sizes in run.MODELS.items():
        assert sizes.trials[0].name == run.BASELINE
        for trial in sizes.trials:
            config = run.configured("embedded", trial, 0, 0.5, tmp_path)
            build_strategy(config)
            assert (config.public is not None) == trial.public, (model, trial.name)
    data, public = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in FILES)
    assert all("client_id" in json.loads(line) for line in data)
    assert all("client_id" not in json.loads(line) for line in public)
    assert not {json.loads(line)["prompt"] for line in data} & {
        json.loads(line)["prompt"] for line in public
    }


FILES = ("data", "public")


def line(trial: str, factor: float, seed: int, loss: float | None) -> dict[str, Any]:
    told = {"model": "embedded", "trial": trial, "factor": factor, "seed": seed, "loss": loss}
    sizes = {"trained": 1000, "up": 4000, "once": 0, "memory": 10**6, "cpu_seconds": 2.0}
    return {**told, **sizes, "lr": 3e-3 * factor}


def test_the_best_of_a_search_is_told_and_compared_in_pairs(tmp_path: Path) -> None:
    results = run.Results(tmp_path / "results.jsonl")
    for trial, searched, losses in (
        (run.BASELINE, (4.0, 3.0), (3.0, 3.2, 3.4)),
        ("last quarter", (3.0, None), (3.1, 3.4, 3.6)),
    ):
        for factor, loss in zip((0.5, 2.0), searched, strict=True):
            results.add(line(trial, factor, run.SEARCH, loss))
        best = 2.0 if trial == run.BASELINE else 0.5
        assert results.best("embedded", trial) == best
        for seed, loss in enumerate(losses):
            results.add(line(trial, best, seed, loss))
    again = run.Results(tmp_path / "results.jsonl")
    own, usual = (again.reported("embedded", name) for name in ("last quarter", run.BASELINE))
    apart = run.paired(own, usual)
    assert apart is not None and apart.high is not None
    assert apart.mean == pytest.approx(0.5 / 3)
    assert apart.high - apart.mean == pytest.approx(4.303 * 0.057735 / 3**0.5, rel=1e-3)
    table = run.table(again, "embedded")
    assert "| last quarter |" in table and "+0.167 ± 0.143" in table
    assert "start=pissa" not in table
    run.plot(again, "embedded", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 2000
