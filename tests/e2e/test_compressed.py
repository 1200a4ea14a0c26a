"""A run with compressed messages: its bytes, killed and resumed, and on both engines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app

OPTIONS = "--clients 4 --cohort 2 --rounds 3 --local-steps 2 --batch-size 4"
QUICK = "--set threads=1 --set eval-examples=8 --set eval-client-examples=2"
CODECS = ["--set", 'codec=["top_k:0.1","int8","zstd"]', "--set", 'codec-down=["bf16"]']


def command(folder: Path, *options: str) -> list[str]:
    run = [sys.executable, "-m", "corolla", "simulate", *OPTIONS.split(), *QUICK.split()]
    return [*run, *CODECS, *options, "--out", str(folder)]


def finish(arguments: list[str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, finish(command(folder), folder)


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
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    note, deadline = folder / "checkpoint" / "round-000001.json", time.monotonic() + 120
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (folder / "adapter").exists()
    resume = [sys.executable, "-m", "corolla", "simulate", "--resume", "--out", str(folder)]
    facts = finish(resume, folder)
    assert facts["adapter_sha256"] == undisturbed[1]["adapter_sha256"]
    assert facts["bytes_up"] == undisturbed[1]["bytes_up"]


def test_both_engines_give_the_same_adapter(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    flower = finish(command(tmp_path / "run", "--engine", "flower"), tmp_path / "run")
    for key in ("adapter_sha256", "state_sha256", "bytes_up", "bytes_down"):
        assert flower[key] == undisturbed[1][key]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('codec=["topk:0.1"]', "did you mean 'top_k'"),
        ('codec=["int8","fp16"]', "the order is rank:R, top_k:DENSITY"),
        ('codec-down=["top_k:0.1"]', "a broadcast holds weights"),
        ("codec=int8", "codec: Input should be a valid list"),
    ],
)
def test_a_wrong_codec_is_one_line(setting: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", "--set", setting, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()
