"""A whole run whose updates go to secure sums."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from corolla.commands.simulate import in_process
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.server.runs import evaluate, proof, run
from corolla.server.runs.proof import Proof
from corolla.server.runs.summary import Summary

Settings = Callable[..., RunConfig]

SECURE = {"secure_sum": True, "smallest_sum": 2, "sum_corrupt": 1}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is generated, proven or drawn: it is not what is looked at."""
    same = Proof(0.0, 1e-4, 0.0, 1, 1, "PEFT", "float32", "none", 0)
    monkeypatch.setattr(evaluate.Evaluator, "samples", lambda self, adapter: [])
    monkeypatch.setattr(run, "OtherProcess", nullcontext)
    monkeypatch.setattr(proof, "prove", lambda judge, adapter, folder, other: same)
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


def test_a_run_ends_where_a_plain_one_does_and_twice_in_the_same_bits(
    settings: Settings, tmp_path: Path
) -> None:
    """Keys and masks are new in each run, and cancel: no bit of the model depends on them."""
    usual = {"rounds": 2, "local_steps": 1, "eval_clients": 0}
    plain = in_process.simulate(settings(**usual), tmp_path / "plain")
    found = [in_process.simulate(settings(**usual, **SECURE), tmp_path / n) for n in "ab"]
    assert found[0].adapter_hash == found[1].adapter_hash != plain.adapter_hash
    assert found[0].final["loss"] == pytest.approx(plain.final["loss"], rel=1e-4)
    lines = _lines(tmp_path / "a")
    assert [line["sum_members"] for line in lines] == [4, 4]
    assert lines[0]["train_loss"] == pytest.approx(
        _lines(tmp_path / "plain")[0]["train_loss"], 1e-3
    )
    assert "num_examples" not in lines[0] or not lines[0]["num_examples"]
    _no_update_is_told(found[0], tmp_path / "a")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _no_update_is_told(summary: Summary, folder: Path) -> None:
    """No client is measured, and no loss of one is written down."""
    assert summary.clients == {}
    for line in _lines(folder):
        assert not any(isinstance(value, dict) and "train_loss" in value for value in line.values())
        assert not line.get("client_loss")


def test_a_cohort_that_gives_no_sum_is_refused_before_anything_is_written(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="smallest-sum"):
        in_process.simulate(settings(secure_sum=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
