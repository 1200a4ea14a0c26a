"""A run says at its start what it has read, and who has nothing to learn from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app

RUNNER = CliRunner()
SMALL = ["--rounds", "1", "--local-steps", "1", "--cohort", "2", "--set", "eval-examples=8"]
SMALL += ["--set", "eval-clients=0", "--set", "threads=1", "--set", "max-length=32"]


@pytest.fixture
def array(tmp_path: Path) -> Path:
    """Two clients with short rows, and one of which every prompt is longer than a sequence."""
    rows = [{"client_id": f"c{i % 2}", "prompt": f"q{i}", "response": "r"} for i in range(40)]
    rows += [{"client_id": "long", "prompt": "word " * 99, "response": "r"}] * 6
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_run_tells_what_it_has_read(array: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = RUNNER.invoke(app, ["simulate", "--data", str(array), *SMALL, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "1 clients left out: no row has a target within max-length=32: long" in result.stdout
    assert "data  a JSON array, UTF-8; all 32 training rows: " in result.stdout
    info = json.loads((out / "run.json").read_text())
    assert info["num_clients"] == 2
    assert info["clients_without_target"] == ["long"]
    assert info["data"]["container"] == "a JSON array, UTF-8"
    assert info["data"]["lengths"]["rows"] == info["data"]["lengths"]["of"] == 32


def test_under_privacy_lengths_are_not_told(array: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    private = ["--dp", "client", "--epsilon", "8", "--delta", "0.05"]
    command = ["simulate", "--data", str(array), *SMALL, *private, "--out", str(out)]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert "training rows:" not in result.stdout
    assert json.loads((out / "run.json").read_text())["data"] == {
        "container": "a JSON array, UTF-8"
    }
