"""A run with compressed messages: its bytes, killed and resumed. On Flower: test_flower.py."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from tests.e2e.forked import Commands

OPTIONS = "--clients 4 --cohort 2 --rounds 3 --local-steps 2 --batch-size 4"
QUICK = "--set threads=1 --set eval-examples=8 --set eval-client-examples=2"
CODECS = ["--set", 'codec=["top_k:0.1","int8","zstd"]', "--set", 'codec-down=["bf16"]']


def command(folder: Path) -> list[str]:
    run = ["simulate", *OPTIONS.split(), *QUICK.split(), *CODECS]
    return [*run, "--out", str(folder)]


def finish(commands: Commands, arguments: list[str], folder: Path) -> dict[str, Any]:
    commands.run(*arguments, folder=folder.parent)
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def undisturbed(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, finish(commands, command(folder), folder)


def test_bytes_are_the_formulas(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """P from the adapter's file: 2 P down in bf16; up at most P/10 codes, P/8 of bitmap, scales."""
    folder, _ = undisturbed
    data = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    p = sum(rows * columns for rows, columns in shapes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["formula_up"] == 2 * (p // 10 + -(-p // 8) + 4 * len(shapes))
        assert 0 < line["bytes_up"] <= line["formula_up"]
        assert line["bytes_down"] == line["formula_down"] == 2 * 2 * p
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_killed_and_resumed_it_ends_in_the_same_adapter(
    commands: Commands, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = commands.start(*command(folder), folder=tmp_path, output=tmp_path / "killed.log")
    note, deadline = folder / "checkpoint" / "round-000001.json", time.monotonic() + 300
    while not note.exists():
        assert time.monotonic() < deadline, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    facts = finish(commands, ["simulate", "--resume", "--out", str(folder)], folder)
    assert facts["adapter_sha256"] == undisturbed[1]["adapter_sha256"]
    assert facts["bytes_up"] == undisturbed[1]["bytes_up"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('codec=["topk:0.1"]', "did you mean 'top_k'"),
        ('codec=["int8","fp16"]', "the order is rank:R, top_k:DENSITY"),
        ('codec-down=["rank:2"]', "a broadcast holds weights"),
        ("codec=int8", "codec: expected a list such as"),
    ],
)
def test_a_wrong_codec_is_one_line(setting: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", "--set", setting, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()
