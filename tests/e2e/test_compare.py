"""`corolla compare` as a user runs it, on a tiny model; its files read with json, csv and PIL."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from corolla.cli.app import app
from tests.e2e.forked import Commands

RUNNER = CliRunner()
TINY = "--rounds 2 --cohort 3 --rank 2 --local-steps 2 --batch-size 3 --seeds 2 --lrs 0.01,0.03"
QUICK = "--set max-length=48 --set eval-examples=8 --set device=cpu --set schedule=constant"
BROKEN = """from corolla.errors import RoundError
from corolla.strategies.fedavg import FedAvg


class Broken(FedAvg):
    def apply(self, state, aggregate):
        raise RoundError("this strategy never works")
"""


def options(model: Path, data: Path, out: Path) -> list[str]:
    where = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return [*TINY.split(), *QUICK.split(), *where]


@pytest.fixture(scope="module")
def compared(
    commands: Commands,
    tiny_model: Path,
    federation_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """(the folder, what was printed) of two strategies that work and one that does not.

    Its cells are processes that import nothing anew.
    """
    folder = tmp_path_factory.mktemp("compare")
    (folder / "mine.py").write_text(BROKEN)
    named = ["fedavg", "flora", f"{folder / 'mine.py'}:Broken"]
    given = options(tiny_model, federation_file, folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(commands.bin / "python"))
        result = RUNNER.invoke(app, ["compare", *named, *given])
    assert result.exit_code == 1, result.output  # a cell has failed
    return folder / "out", result.output


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"<{tag}>"] if tag in ("script", "link", "img", "iframe") else []
        for name, value in attrs:
            if name.rpartition(":")[2] in ("src", "href") and not (value or "").startswith("#"):
                self.found.append(f"{name}={value}")


def test_the_folder_holds_what_is_promised(compared: tuple[Path, str]) -> None:
    folder, printed = compared
    found = json.loads((folder / "results.json").read_text())
    for entry in found["methods"][:2]:
        assert entry["loss"]["n"] == 2
        assert entry["loss"]["mean"] < entry["curve"][0]["loss"]
        assert len(entry["search"]) == 2
    assert found["unequal"] == []
    assert found["failed"].keys() == {"Broken-0.01-0", "Broken-0.03-0"}
    whys = set(found["failed"].values())
    assert all(why.startswith("this strategy never works; given up after 3") for why in whys), whys
    assert printed.count("this strategy never works") >= 2
    page = (folder / "report.html").read_text()
    assert Links(page).found == []
    assert "Equal terms" in page
    plots = {path.name for path in (folder / "plots").iterdir()}
    for name in ("loss-rounds", "loss-bytes", "loss-seconds", "pareto", "lr-search"):
        assert {f"{name}.png", f"{name}.svg"} <= plots
        with Image.open(folder / "plots" / f"{name}.png") as image:
            assert image.size[0] > 1000
    assert not list(folder.rglob("updates")) and not list(folder.rglob("global"))


def test_a_contender_is_the_run_with_its_settings_and_stands_beside_baselines(
    commands: Commands,
    tiny_model: Path,
    federation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", str(commands.bin / "python"))
    given = options(tiny_model, federation_file, tmp_path / "out")
    few = ["--rounds", "1", "--seeds", "1", "--lrs", "0.01", "--with", "local,global"]
    result = RUNNER.invoke(app, ["compare", "fedavg@rank=3,alpha=5", *given, *few])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["failed"], found["unequal"]) == ({}, [])
    labels = ["fedavg@rank=3,alpha=5", "local", "global"]
    assert [entry["label"] for entry in found["methods"]] == labels
    assert [row["verdict"] for row in found["held_out"]["rows"]] == ["not judged"]
    assert [row["label"] for row in found["own"]["rows"]] == ["local"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fedavg@rank=3,alpha=5" in page and "one client with the training rows of all" in page
    cell = tmp_path / "out" / "cells" / "fedavg@rank=3,alpha=5-0.01-0" / "run.json"
    same = "--cohort 3 --local-steps 2 --batch-size 3 --rounds 1 --lr 0.01"
    own = "--set rank=3 --set alpha=5 --set eval-participants=true --set threads=1"
    where = ["--model", str(tiny_model), "--data", str(federation_file), "--out", "alone"]
    commands.run("simulate", *same.split(), *own.split(), *QUICK.split(), *where, folder=tmp_path)
    runs = (cell, tmp_path / "alone" / "run.json")
    hashes = [json.loads(path.read_text())["adapter_sha256"] for path in runs]
    assert hashes[0] == hashes[1]


def test_cells_are_runs_and_the_csv_says_what_they_say(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3  # methods, seeds, rounds with the start
    for row in rows:
        run = folder / "cells" / f"{row['method']}-{float(row['lr']):g}-{row['seed']}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        round = int(row["round"])
        info = json.loads((run / "run.json").read_text())
        wanted = lines[round - 1]["eval_loss"] if round else info["base"]["loss"]
        assert float(row["loss"]) == wanted
        sent = sum(line["bytes_up"] + line["bytes_down"] for line in lines[:round])
        assert float(row["bytes_per_client"]) == pytest.approx(sent / 4)


def test_the_reported_error_of_aggregation_is_the_one_that_peft_sees(
    compared: tuple[Path, str], tiny_model: Path, tmp_path: Path
) -> None:
    """The cell once more, with its updates kept; effective weights by peft alone, in fp64."""
    folder, _ = compared
    entry = json.loads((folder / "results.json").read_text())["methods"][0]
    cell = folder / "cells" / f"fedavg-{entry['lr']:g}-1.toml"
    again = tmp_path / "run"
    result = RUNNER.invoke(
        app, ["simulate", "--config", str(cell), "--keep-updates", "--out", str(again)]
    )
    assert result.exit_code == 0, result.output

    def effective(adapter: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, str(adapter))
        parts = [m.get_delta_weight("default") for m in tuned.modules() if hasattr(m, "lora_A")]
        return torch.cat([part.detach().double().flatten() for part in parts])

    for round, found in enumerate(entry["aggregation_errors"], start=1):
        mean = torch.zeros(())
        for note in (again / "updates" / f"round-{round:03d}").glob("*/update.json"):
            mean = mean + json.loads(note.read_text())["weight"] * effective(note.parent)
        after = effective(again / "global" / f"round-{round:03d}")
        assert found == pytest.approx(float((after - mean).norm() / mean.norm()), rel=1e-4)
        assert found > 1e-4  # fedavg is not exact


def test_sigterm_ends_the_children_and_resume_goes_on(
    tiny_model: Path, federation_file: Path, tmp_path: Path
) -> None:
    """One cell, which is started cold, as its parent is; it says what its process took."""
    given = options(tiny_model, federation_file, tmp_path / "out")
    given += ["--rounds", "1", "--seeds", "1", "--lrs", "0.01"]
    command = [sys.executable, "-m", "corolla", "compare", "fedavg", *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cells = tmp_path / "out" / "cells"
    deadline = time.monotonic() + 120
    while not list(cells.glob("*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cells are finished: go on with --resume" in said
    assert "Traceback" not in said
    alive = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(cells).encode() in _read(path) and path.parent.name != str(os.getpid())
    ]
    assert alive == []
    result = RUNNER.invoke(app, ["compare", "fedavg", *given, "--resume"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["methods"][0]["loss"]["n"] == 1
    assert found["methods"][0]["cpu_seconds"] > 1
    assert "One seed" in (tmp_path / "out" / "report.html").read_text()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["fedavg", "florra"], 2, "did you mean 'flora'"),
        (["fedavg", "--lrs", "a,b"], 2, "expected numbers between commas"),
        (["fedavg", "--data", "missing.jsonl"], 1, "cannot read data file missing.jsonl"),
        (["fedavg", "--resume"], 2, "nothing to resume"),
        (["missing.py:Mine"], 2, "cannot read strategy file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    given: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["compare", *given, "--out", "run"])
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []
