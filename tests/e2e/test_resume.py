"""Killed at any moment, a run resumes from its last committed round to the same final adapter."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.server.runs.journal import read
from tests.e2e.forked import Commands

OPTIONS = "--clients 4 --cohort 2 --rounds 4 --local-steps 2 --batch-size 4 --strategy flora"
QUICK = "--set threads=1 --set eval-examples=8 --set eval-client-examples=2"
RUNNER = CliRunner()


def wait_for_a_commit(folder: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not any(entry["event"] == "committed" for entry in read(folder)):
        assert time.monotonic() < deadline, "no round was committed"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = RUNNER.invoke(
        app, ["simulate", *OPTIONS.split(), *QUICK.split(), "--out", str(folder)]
    )
    assert result.exit_code == 0, result.output
    return str(json.loads((folder / "run.json").read_text())["adapter_sha256"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resume_ends_in_the_same_adapter(
    how: signal.Signals, commands: Commands, undisturbed: str, tmp_path: Path
) -> None:
    folder, said = tmp_path / "run", tmp_path / "errors"
    process = commands.start(
        *("simulate", *OPTIONS.split(), *QUICK.split(), "--keep-updates", "--out", str(folder)),
        folder=tmp_path,
        output=tmp_path / "output",
        errors=said,
    )
    try:
        wait_for_a_commit(folder)
    finally:
        os.kill(process.pid, how)
    code, errors = process.wait(), said.read_text()
    if how == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        assert read(folder)[-1]["event"] == "stopped"
        assert "go on with --resume" in errors
        assert "Traceback" not in errors
    assert not (folder / "adapter").exists()
    result = RUNNER.invoke(app, ["simulate", "--resume", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert "resumed after round" in result.output
    facts = json.loads((folder / "run.json").read_text())
    assert facts["adapter_sha256"] == undisturbed
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    for kept, first in (("updates", 1), ("global", 0)):
        names = [path.name for path in sorted((folder / kept).iterdir())]
        assert names == [f"round-{i:03d}" for i in range(first, 5)]
    for path in (folder, *folder.rglob("*")):
        assert not path.stat().st_mode & 0o077, f"others can read {path}"


def test_resume_refuses_changed_data(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"message number {i}", "client_id": f"c{i % 2}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["simulate", "--data", str(data), "--rounds", "1", "--local-steps", "1", *QUICK.split()]
    assert RUNNER.invoke(app, [*run, "--out", str(tmp_path / "run")]).exit_code == 0
    data.write_text(data.read_text().replace("message", "letter"))
    result = RUNNER.invoke(app, ["simulate", "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "is not what" in result.stderr


def test_resume_refuses_other_settings(undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--out", str(folder)]
    assert RUNNER.invoke(app, ["simulate", *short, *QUICK.split()]).exit_code == 0
    result = RUNNER.invoke(app, ["simulate", "--resume", "--out", str(folder), "--rank", "4"])
    assert result.exit_code == 2
    assert "rank=8, found 4" in result.stderr
    same = ["simulate", "--resume", "--out", str(folder), "--rank", "8"]
    assert RUNNER.invoke(app, same).exit_code == 0
