"""Selection, classes of devices, simulated time and asynchronous aggregation in whole runs."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla import simulate
from corolla.cli.app import app
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, DataError, RoundError, StoppedError
from corolla.server import app as served
from corolla.server.runs.observer import Silent
from tests.e2e.forked import Commands

Settings = Callable[..., RunConfig]
QUICK: dict[str, Any] = {"eval_clients": 1, "eval_client_examples": 2, "eval_every": 10}


def told(folder: Path) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


class Stopping(Silent):
    """Stops a run when a client of a round has answered, before the round is complete."""

    def __init__(self, round: int) -> None:
        self.round, self.now = round, 0

    def round_started(self, round: int, cohort: int) -> None:
        self.now = round

    def replied(self, client: str) -> None:
        if self.now == self.round:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, federation_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A config file of an asynchronous run, and the folder of that run."""
    place = tmp_path_factory.mktemp("asynchronous")
    file, folder = place / "run.toml", place / "run"
    file.write_text(
        f"""
model = {json.dumps(str(tiny_model))}
data = {json.dumps(str(federation_file))}
strategy = "flora"
cohort = 3
buffer = 2
rounds = 5
rank = 2
local_steps = 2
batch_size = 3
max_length = 48
threads = 1
device = "cpu"
eval_clients = 1
eval_client_examples = 2
eval_every = 10

[classes.fast]
speed = 4.0
download = 1e5
rank = 4
alpha = 8.0

[classes.slow]
upload = 2e4
drop = 0.3
"""
    )
    result = CliRunner().invoke(app, ["simulate", "--config", str(file), "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert "simulated" in result.output
    return file, folder


def test_an_asynchronous_run_says_what_it_did(undisturbed: tuple[Path, Path]) -> None:
    _, folder = undisturbed
    found = lines(folder)
    assert all(line["clients"] == 2 for line in found)
    assert any(line["staleness_max"] > 0 for line in found)
    assert any(line["dropped"] for line in found)
    total = sum(line["sim_seconds"] for line in found)
    assert told(folder)["sim_seconds"] == pytest.approx(total)
    assert total > 0
    assert "simulated, all rounds" in (folder / "report.html").read_text()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] >= 4


def same_outcome(folder: Path, wanted: Path) -> None:
    for name in ("adapter_sha256", "state_sha256", "sim_seconds"):
        assert told(folder)[name] == told(wanted)[name]
    for found, other in zip(lines(folder), lines(wanted), strict=True):
        for name in ("round", "sim_seconds", "staleness", "staleness_max", "bytes_up", "dropped"):
            assert found[name] == other[name]


@pytest.mark.parametrize("round", [2, 4])
def test_a_stopped_asynchronous_run_ends_in_the_same_adapter(
    round: int, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    _, wanted = undisturbed
    config = RunConfig.model_validate(told(wanted)["config"])
    folder = tmp_path / "run"
    with pytest.raises(StoppedError, match=f"round {round - 1} is kept"):
        simulate(config, folder, Stopping(round))
    simulate(config, folder, resume=True)
    same_outcome(folder, wanted)


def test_a_killed_asynchronous_run_ends_in_the_same_adapter(
    commands: Commands, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    file, wanted = undisturbed
    folder, log = tmp_path / "run", tmp_path / "killed.log"
    process = commands.start(
        *("simulate", "--config", str(file), "--out", str(folder)), folder=tmp_path, output=log
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint" / "round-000002.json").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = CliRunner().invoke(app, ["simulate", "--resume", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    same_outcome(folder, wanted)


@pytest.mark.deployment
def test_flowers_engine_gives_the_same_asynchronous_run(
    commands: Commands, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    file, wanted = undisturbed
    more = ["--engine", "flower", "--out", str(tmp_path / "run")]
    commands.run("simulate", "--config", str(file), *more, folder=tmp_path)
    same_outcome(tmp_path / "run", wanted)


def test_a_deployment_refuses_simulated_asynchrony() -> None:
    context: Any = SimpleNamespace(run_config={"buffer": 2}, run_id=1)
    grid: Any = None
    with pytest.raises(ConfigError, match=r"buffer, .* simulate devices"):
        served.main(grid, context)


def test_a_full_buffer_is_synchronous_training(settings: Settings, tmp_path: Path) -> None:
    """With compression that leaves something on the devices, too."""
    hashes = []
    for name, buffer in (("plain", None), ("buffered", 3)):
        config = settings(**QUICK, cohort=3, buffer=buffer, codec=["top_k:0.25", "int8"])
        hashes.append(simulate(config, tmp_path / name).adapter_hash)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "hetlora"])
def test_ranks_by_class(strategy: str, settings: Settings, tmp_path: Path) -> None:
    classes = {"small": {"rank": 2}, "large": {"rank": 4, "alpha": 8.0}}
    config = settings(**QUICK, strategy=strategy, classes=classes, rounds=2)
    simulate(config, tmp_path / "run", keep_updates=True)
    for client, rank, alpha in (("ada", 2, 4.0), ("ben", 4, 8.0), ("cyd", 2, 4.0), ("dot", 4, 8.0)):
        file = tmp_path / "run" / "updates" / "round-001" / client / "adapter_config.json"
        kept = json.loads(file.read_text())
        assert (kept["r"], kept["lora_alpha"]) == (rank, alpha)
    same = settings(**QUICK, strategy=strategy, ranks=[2, 4], alphas=[4.0, 8.0], rounds=2)
    simulate(same, tmp_path / "same")
    assert told(tmp_path / "run")["adapter_sha256"] == told(tmp_path / "same")["adapter_sha256"]


def trace(file: Path, *spans: tuple[str, int, int]) -> Path:
    rows = [{"client_id": c, "from": a, "to": b} for c, a, b in spans]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_trace_decides_who_takes_part(settings: Settings, tmp_path: Path) -> None:
    file = trace(tmp_path / "trace.jsonl", ("ada", 1, 1), ("ben", 1, 2), ("cyd", 2, 2))
    config = settings(**QUICK, cohort=2, availability=str(file))
    with pytest.raises(
        RoundError, match=r"round 3: none of 4 clients can be reached: see .*trace\.jsonl"
    ):
        simulate(config, tmp_path / "run")
    assert [set(line["client_loss"]) for line in lines(tmp_path / "run")] == [
        {"ada", "ben"},
        {"ben", "cyd"},
    ]
    trace(file, ("ada", 1, 3))
    with pytest.raises(ConfigError, match=r"the availability .* is not what"):
        simulate(config, tmp_path / "run", resume=True)


def test_bad_policies_are_said_before_a_round(settings: Settings, tmp_path: Path) -> None:
    nowhere = settings(availability=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"cannot read availability file .*nowhere\.jsonl"):
        simulate(nowhere, tmp_path / "run")
    with pytest.raises(ConfigError, match="buffer 5 is larger than the cohort of 4 clients"):
        simulate(settings(cohort=None, buffer=5), tmp_path / "run")
    with pytest.raises(ConfigError, match="--keep-updates shows rounds of updates"):
        simulate(settings(buffer=2), tmp_path / "run", keep_updates=True)
    assert not (tmp_path / "run").exists()
