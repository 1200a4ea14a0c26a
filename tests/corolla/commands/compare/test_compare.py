"""The running of cells, with children that do nothing but write a run folder."""

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from corolla.commands.compare import compare as module
from corolla.commands.compare import runner
from corolla.commands.compare.compare import compare
from corolla.commands.compare.grid import ComparisonGrid, Method, make_grid
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, CorollaError, StoppedError

Settings = Callable[..., RunConfig]


class Fake:
    """A child that ends at the second look and writes a run; lr 0.02 is best, 9 diverges."""

    started: ClassVar[list[str]] = []
    most = 0
    alive = 0
    fails: ClassVar[dict[str, str]] = {}
    peak = 1000
    on_start: ClassVar[Callable[[str], None]] = staticmethod(lambda name: None)

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.cpu_seconds = 1.5
        self.code: int | None = None
        self.looks = 0

    def start(self) -> None:
        Fake.started.append(self.log.stem)
        Fake.alive += 1
        Fake.most = max(Fake.most, Fake.alive)
        Fake.on_start(self.log.stem)

    def ended(self) -> bool:
        self.looks += 1
        if self.code is None and self.looks > 1:
            Fake.alive -= 1
            self.code = 1 if self.log.stem in Fake.fails else 0
            if self.code == 0:
                self.write()
        return self.code is not None

    def last_words(self, mark: str, silent: str) -> str:
        return Fake.fails[self.log.stem]

    def write(self) -> None:
        config = load(Path(self.command[self.command.index("--config") + 1]), {})
        run = Path(self.command[self.command.index("--out") + 1])
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        loss = 2 + abs(config.lr - 0.02) + config.seed / 10
        line = {
            **{"round": 1, "eval_loss": loss, "bytes_up": 8, "bytes_down": 8, "seconds": 1.0},
            **{"clients": 1, "dropped": 0, "client_loss": {"ada": 1.0}, "target_tokens": 5.0},
        }
        info = {
            "config": config.model_dump(mode="json"),
            "num_clients": 2,
            "base": {"loss": 5.0},
            "final": {"loss": loss, "accuracy": 0.5},
            "clients": {
                "ada": {
                    "base": {"loss": 5.0, "examples": 1},
                    "final": {"loss": loss, "loss_choosing": loss, "loss_reported": loss},
                }
            },
            "bytes_up": 8,
            "bytes_down": 8,
            "peak_rss": Fake.peak,
            "warnings": [],
            "model_sha256": "m",
            "data_sha256": "d",
        }
        (run / "run.json").write_text(json.dumps(info))
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def small(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComparisonGrid:
    monkeypatch.setattr(runner, "Child", Fake)
    monkeypatch.setattr(runner, "stop", lambda *_: None)
    monkeypatch.setattr(runner, "_BEAT", 0.0)
    monkeypatch.setattr(module, "write_comparison", lambda folder, results: None)
    monkeypatch.setattr("corolla.models.files.adapter_files.adapter_hash", lambda folder: "same")
    monkeypatch.setattr(module, "cores", lambda: 2)
    for name, value in (("started", []), ("most", 0), ("alive", 0), ("fails", {}), ("peak", 1000)):
        monkeypatch.setattr(Fake, name, value)
    monkeypatch.setattr(Fake, "on_start", staticmethod(lambda name: None))
    config = settings(rounds=1)
    given = {"model": config.model, "data": config.data, "rounds": 1}
    return make_grid(["fedavg", "flora"], options=given, lrs=[0.01, 0.02, 9.0])


def test_every_rate_once_at_the_first_seed_then_the_best_with_the_others(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    found = compare(small, tmp_path / "out")
    search = {f"{m}-{lr}-0" for m in ("fedavg", "flora") for lr in ("0.01", "0.02", "9")}
    others = {f"{m}-0.02-{seed}" for m in ("fedavg", "flora") for seed in (1, 2)}
    assert sorted(Fake.started) == sorted(search | others)  # nothing twice
    assert Fake.most == 2
    entry = found["methods"][0]
    assert (entry["lr"], entry["edge"]) == (0.02, None)
    assert entry["loss"]["mean"] == pytest.approx(2.1)
    assert [run["seed"] for run in entry["runs"]] == [0, 1, 2]
    assert (found["failed"], found["unequal"]) == ({}, [])
    assert found["initial"] == {"same": ["fedavg", "flora"]}
    begun = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert begun["plan"] == json.loads(json.dumps(small.to_json()))


def test_a_rate_that_diverges_is_a_result_and_a_failure_stops_nobody(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    Fake.fails = {"fedavg-9-0": "loss is nan: lower lr", "flora-0.02-1": "the disk is full"}
    found = compare(small, tmp_path / "out")
    assert found["diverged"] == {"fedavg-9-0": "loss is nan: lower lr"}
    assert found["failed"] == {"flora-0.02-1": "the disk is full"}
    assert found["methods"][1]["loss"]["n"] == 2
    assert found["held_out"]["rows"][0]["difference"]["n"] == 2
    Fake.fails, Fake.started = {}, []
    again = compare(small, tmp_path / "out", resume=True)
    assert Fake.started == ["fedavg-9-0", "flora-0.02-1"]  # what is finished is kept
    assert again["methods"][1]["loss"]["n"] == 3


def test_a_method_without_a_single_run_leaves_the_others_their_report(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    Fake.fails = {f"flora-{lr}-0": "boom" for lr in ("0.01", "0.02", "9")}
    found = compare(small, tmp_path / "out")
    assert "curve" not in found["methods"][1]
    assert found["methods"][1]["lr"] is None
    Fake.fails |= {f"fedavg-{lr}-0": "boom" for lr in ("0.01", "0.02", "9")}
    with pytest.raises(CorollaError, match="no cell has finished: boom"):
        compare(small, tmp_path / "none")


def test_fewer_cells_side_by_side_when_memory_would_not_hold_them(
    small: ComparisonGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fake.peak = 1 << 60
    at: list[int] = []
    Fake.on_start = staticmethod(lambda name: at.append(Fake.alive))
    compare(small, tmp_path / "out")
    assert set(at) == {1}  # one to begin with: what a cell takes is not known
    at.clear()
    Fake.peak = 1
    compare(small, tmp_path / "roomy")
    assert at[0] == 1
    assert set(at[3:]) >= {2}
    at.clear()
    compare(small, tmp_path / "obeyed", jobs=2)
    assert set(at[3:]) >= {2}


def test_ctrl_c_says_what_is_finished_and_resume_goes_on(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    def interrupt(name: str) -> None:
        if len(Fake.started) == 4:
            signal.raise_signal(signal.SIGINT)

    Fake.on_start = staticmethod(interrupt)
    with pytest.raises(StoppedError, match=r"\d of 10 cells are finished: go on with --resume"):
        compare(small, tmp_path / "out", jobs=1)
    done = {path.stem for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert len(done) == 3
    Fake.started, Fake.alive = [], 0
    Fake.on_start = staticmethod(lambda name: None)
    compare(small, tmp_path / "out", jobs=1, resume=True)
    assert len(Fake.started) == 7
    assert not done & set(Fake.started)


def test_a_half_done_run_is_resumed_and_its_cpu_time_is_not_known(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    compare(small, tmp_path / "out")
    cells = tmp_path / "out" / "cells"
    (cells / "flora-0.02-1.json").unlink()
    commands: list[str] = []
    Fake.on_start = staticmethod(commands.append)
    compare(small, tmp_path / "out", resume=True)
    assert commands == ["flora-0.02-1"]
    assert json.loads((cells / "flora-0.02-1.json").read_text())["cpu_seconds"] is None


def test_a_folder_in_use_or_begun_otherwise_is_refused(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        compare(small, tmp_path / "out", resume=True)
    compare(small, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty: add --resume"):
        compare(small, tmp_path / "out")
    first = small.methods[0]
    other = ComparisonGrid((Method("fedavg", first.config, (0.5,)), small.methods[1]), small.seeds)
    with pytest.raises(ConfigError, match=r"begun with methods.fedavg.lrs = \[0.01, 0.02, 9.0\]"):
        compare(other, tmp_path / "out", resume=True)
    (tmp_path / "out" / "compare.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(small, tmp_path / "out", resume=True)


def test_settings_reach_a_cell_by_its_file_even_those_that_toml_cannot_write(
    small: ComparisonGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept(Fake):
        commands: ClassVar[list[list[str]]] = []

        def __init__(self, command: Sequence[str], log: Path) -> None:
            Kept.commands.append(list(command))
            super().__init__(command, log)

    monkeypatch.setattr(runner, "Child", Kept)
    config = small.methods[0].config.model_copy(update={"clip_norm": None})
    one = ComparisonGrid((Method("fedavg", config, (0.1,)),), (5,))
    compare(one, tmp_path / "out")
    (command,) = Kept.commands
    cell = Path(command[command.index("--config") + 1])
    pairs = [b for a, b in itertools.pairwise(command) if a == "--set"]
    assert load(cell, {}, pairs) == config.model_copy(update={"lr": 0.1, "seed": 5})
    assert load(cell, {}).clip_norm == 1.0  # the file alone would have said otherwise


def test_validation_rows_do_not_choose_a_rate_and_stand_in_the_report(
    small: ComparisonGrid, tmp_path: Path
) -> None:
    rows = [
        {"client_id": c, "text": f"{c} {i}", "split": "validation" if i == 0 else "train"}
        for c in ("ada", "ben")
        for i in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": small.methods[0].config.model, "data": str(file), "rounds": 1}
    several = make_grid(["fedavg"], options=given, lrs=[0.01, 0.02])
    with pytest.raises(ConfigError, match="mark rows with split=test, or give one rate"):
        compare(several, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    one = make_grid(["fedavg"], options=given, lrs=[0.01], seeds=1)
    assert compare(one, tmp_path / "out")["methods"][0]["loss"]["n"] == 1
    file.write_text(file.read_text() + json.dumps({**rows[1], "split": "test"}) + "\n")
    assert compare(several, tmp_path / "tested")["failed"] == {}
