"""Trackers offline: what a run of three rounds leaves, read back with each library's own reader."""

import importlib.util
import json
import os
import sqlite3
import struct
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla import trackers
from corolla.cli.app import app
from corolla.commands.simulate import in_process
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.server.runs import run
from corolla.server.runs.observer import Many, Silent
from corolla.trackers import flat, numbers, open_trackers, tracking

Settings = Callable[..., RunConfig]
Read = Callable[[Path], dict[str, list[tuple[int, float]]]]

# What the libraries do at home: SQLAlchemy's loaders, open sockets and files of wandb's service.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


class StopError(Exception):
    """As if the process had been killed."""


class Stop(Silent):
    def round_started(self, round: int, cohort: int) -> None:
        if round == 3:
            raise StopError


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    texts = {t: events.Tensors(t)[-1].tensor_proto.string_val[0] for t in events.Tags()["tensors"]}
    outcome = json.loads(texts["outcome/text_summary"])
    assert json.loads(texts["config/text_summary"])["rounds"] == 3
    found = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}
    return {**found, **{k: [(0, v)] for k, v in outcome.items() if k != "status"}}


def wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the offline files, in wandb's format: blocks of LevelDB's log, records in protobuf.

    Its service writes the last of them after `finish`; who ends a Python process waits for it, as
    here.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    found: dict[str, list[tuple[int, float]]] = {}
    config: dict[str, Any] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = struct.unpack_from("<HB", data, at + 4)
            if not kind:
                break
            record += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (2, 3):
                continue
            said, record = Record.FromString(record), b""
            config |= {i.key: json.loads(i.value_json) for i in said.run.config.update}
            values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in said.history.item}
            for key, value in values.items():
                if not key.startswith("_"):
                    found.setdefault(key, []).append((values["_step"], value))
            for item in said.summary.update:
                if "/" in (item.key or "/".join(item.nested_key)):
                    found["/".join(item.nested_key) or item.key] = [
                        (0, json.loads(item.value_json))
                    ]
    assert config["rounds"] == 3
    return found


def mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("corolla").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["rounds"] == "3"
    keys = run.data.metrics
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in keys
    }


def trackio(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (path,) = Path(os.environ["TRACKIO_DIR"]).glob("corolla*.db")
    found: dict[str, list[tuple[int, float]]] = {}
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["rounds"] == 3
    for step, text in rows:
        for key, value in json.loads(text).items():
            found.setdefault(key, []).append((step, value))
    return found


READERS: dict[str, Read] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


@pytest.fixture(params=list(READERS))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    found = str(request.param)
    if importlib.util.find_spec(found) is None:  # not imported: trackio would read its folder
        pytest.skip(f"needs the extra corolla[{found}]")
    for key in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.delenv(key, raising=False)
    yield found
    if found == "wandb":
        import wandb

        wandb.teardown()


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_every_tracker_has_its_test_and_its_extra() -> None:
    assert READERS.keys() == trackers.TRACKERS.keys()
    root = Path(__file__).resolve().parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert trackers.TRACKERS.keys() <= project["optional-dependencies"].keys()


def test_a_run_is_tracked_and_a_resumed_one_goes_on(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    """Stopped while the third round began, then resumed: one run, each round once."""
    folder = tmp_path / "out"
    with pytest.raises(StopError), tracking([name], folder, refuse) as watching:
        in_process.simulate(settings(), folder, Many([*watching, Stop()]))
    with tracking([name], folder, refuse) as watching:
        summary = in_process.simulate(settings(), folder, Many(watching), resume=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = READERS[name](folder)
    for key in ("train_loss", "bytes_up", "seconds"):
        assert [step for step, _ in found[key]] == [1, 2, 3], key
        assert [v for _, v in found[key]] == pytest.approx([line[key] for line in lines]), key
    assert [step for step, _ in found["eval_loss"]] == [0, 1, 2, 3]
    assert [v for _, v in found["eval_loss"]] == pytest.approx(
        [summary.base["loss"], *(line["eval_loss"] for line in lines)]
    )
    assert found["total/bytes_up"][-1][1] == summary.bytes_up
    assert found["final/loss"][-1][1] == pytest.approx(summary.final["loss"])
    assert found["fairness/final/worst_decile"][-1][1] == pytest.approx(
        summary.fairness["final"]["worst_decile"]
    )
    assert "client_loss" not in found
    assert "round" not in found


def test_a_tracker_does_not_change_a_run(name: str, settings: Settings, tmp_path: Path) -> None:
    plain = in_process.simulate(settings(rounds=1), tmp_path / "plain")
    with tracking([name], tmp_path / "out", refuse) as watching:
        tracked = in_process.simulate(settings(rounds=1), tmp_path / "out", Many(watching))
    assert tracked.adapter_hash == plain.adapter_hash
    infos = [json.loads((tmp_path / f / "run.json").read_text()) for f in ("plain", "out")]
    assert infos[0]["config"] == infos[1]["config"]


def test_a_run_that_keeps_nothing_leaves_nothing(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    class Early(Silent):
        def round_started(self, round: int, cohort: int) -> None:
            raise StopError

    said: list[str] = []
    with pytest.raises(StopError), tracking([name], tmp_path / "out", said.append) as watching:
        in_process.simulate(settings(), tmp_path / "out", Many([*watching, Early()]))
    assert not (tmp_path / "out").exists()


class Fake:
    """A tracker that fails at the second round."""

    made: list["Fake"]

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        self.logged: list[int] = []
        self.made.append(self)

    def log(self, values: Mapping[str, float], round: int) -> None:
        if round == 2:
            raise OSError("the disk\nis full")
        self.logged.append(round)

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        self.logged.append(-1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    Fake.made = []
    module = type(sys)("fake_tracker")
    module.Tracker = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_tracker", module)
    monkeypatch.setitem(trackers.TRACKERS, "json", "fake_tracker")  # any name that is installed
    return Fake


def test_a_tracker_that_fails_costs_one_warning(
    fake: type[Fake], settings: Settings, tmp_path: Path
) -> None:
    said: list[str] = []
    with tracking(["json"], tmp_path / "out", said.append) as watching:
        summary = in_process.simulate(settings(), tmp_path / "out", Many(watching))
    assert summary.rounds == 3
    assert said == [
        "tracker json failed and is off; the run is not affected: OSError: the disk is full"
    ]
    assert [made.logged for made in fake.made] == [[0, 1]]


def test_a_name_given_twice_counts_once(fake: type[Fake], tmp_path: Path) -> None:
    assert [t.name for t in open_trackers(["json", "json"], tmp_path, refuse)] == ["json"]


def test_a_tracker_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'corolla\[wandb\]'"):
        open_trackers(["wandb"], tmp_path, refuse)


def test_an_unknown_tracker_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["simulate", "--track", "tensorbord", "--out", str(out)])
    assert result.exit_code == 2
    known = ", ".join(sorted(READERS))
    assert f"unknown tracker 'tensorbord': known are {known}" in result.stderr
    assert not out.exists()


def test_several_observers_hear_the_same() -> None:
    heard: list[tuple[str, str, Any]] = []

    class Ear:
        def __init__(self, own: str) -> None:
            self.own = own

        def started(self, facts: Mapping[str, Any], first_round: int) -> None:
            heard.append((self.own, "started", first_round))

        def warned(self, text: str) -> None:
            heard.append((self.own, "warned", text))

        def round_started(self, round: int, cohort: int) -> None:
            heard.append((self.own, "round", (round, cohort)))

        def replied(self, client: str) -> None:
            heard.append((self.own, "replied", client))

        def round_ended(self, line: Mapping[str, Any]) -> None:
            heard.append((self.own, "ended", line["round"]))

    many = Many([Ear("a"), Ear("b")])
    many.started({}, 4)
    many.warned("slow")
    many.round_started(4, 2)
    many.replied("ada")
    many.round_ended({"round": 4})
    events = [
        ("started", 4),
        ("warned", "slow"),
        ("round", (4, 2)),
        ("replied", "ada"),
        ("ended", 4),
    ]
    assert heard == [(own, *event) for event in events for own in "ab"]


def test_only_numbers_are_logged() -> None:
    values = {"a": 1, "b": 2.5, "c": None, "d": "3", "e": True, "f": {"g": 4, "h": {"i": 5.0}}}
    assert numbers(values) == {"a": 1.0, "b": 2.5}
    assert flat(values) == {"a": 1.0, "b": 2.5, "f/g": 4.0, "f/h/i": 5.0}
