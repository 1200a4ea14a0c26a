"""The aggregators of docs/check.md: the right one passes, the wrong one fails as the text says."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands.check.proofs import conform

TEXT = (Path(__file__).resolve().parents[4] / "docs" / "check.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def test_the_documented_aggregator_passes_every_proof(written: Path) -> None:
    (result,) = conform([f"{written}/clipped.py:Clipped"])
    assert [finding for finding in result.findings if not finding.passed] == []
    assert result.passed
    assert {f.model for f in result.findings} == {"llama", "gpt2", "bert"}
    tried = {tuple(f.options.items()) for f in result.findings}
    assert tried == {(), (("bound", 0.1),)}


def test_the_documented_mistake_fails_as_the_text_says(written: Path) -> None:
    name = f"{written}/median_of_means.py:Robust"
    (result,) = conform([name], models=["llama"])
    said = {"order", "grouping", "every weight counts", "shares alone count"}
    assert {f.check for f in result.findings if not f.passed} == said
    notes = {f.check: f.note for f in result.findings}
    assert re.search(r"clients in the order \w+-\d, ", notes["order"])
    assert re.search(r"merged as \(.*\w+-\d.*\)", notes["grouping"])
    assert "ada" in notes["every weight counts"]
    assert re.search(r"ada-0 with next to no weight|in three parts", notes["shares alone count"])
    assert not result.claims


def test_the_command_takes_options_and_says_what_it_took(written: Path) -> None:
    name = f"{written}/clipped.py:Clipped"
    command = ["check", name, "--set", "strategy.bound=0.5", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.output)
    assert result["passed"]
    assert result["options"] == {"bound": 0.5}
    assert result["seconds"] > 0
    assert result["cpu_seconds"] > 0
    assert all(finding["options"] == {"bound": 0.5} for finding in result["findings"])
    old = {"strategy", "aggregates", "findings", "claims", "passed"}
    assert old <= result.keys()
    assert {"check", "model", "measured", "limit", "note", "passed"} <= result["findings"][0].keys()


def test_the_command_exits_with_1_where_a_proof_fails(written: Path) -> None:
    done = CliRunner().invoke(app, ["check", f"{written}/median_of_means.py:Robust"])
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    assert "FAILED (it claims no mean, so none was checked)" in text
    assert "every weight counts, llama: weights of ada, ben, cyd" in text
    assert "of CPU time" in text
