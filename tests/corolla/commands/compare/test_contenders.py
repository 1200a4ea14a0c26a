"""Contenders of a comparison: names with settings, and the two baselines."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corolla.commands.compare.contenders import baselines, contender, file_names
from corolla.commands.compare.grid import ComparisonGrid, make_grid
from corolla.commands.simulate import in_process
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.errors import ConfigError
from corolla.models.files.adapter_files import adapter_hash
from corolla.server.runs import run

Settings = Callable[..., RunConfig]

CLASSES = 'classes={"a":{"lr":1},"b":{}}'


@pytest.mark.parametrize(
    ("text", "label", "settings"),
    [
        ("fedavg", "fedavg", ()),
        ("ffa-lora", "ffa_lora", ()),
        ("fedavg@rank=4", "fedavg@rank=4", ("rank=4",)),
        ("fedavg@parameters=ia3,lr=3e-3", "fedavg@parameters=ia3,lr=3e-3", None),
        ("fedavg@local-steps=2", "fedavg@local_steps=2", ("local-steps=2",)),
        ("flora@ranks=[4,8],alpha=2", "flora@ranks=[4,8],alpha=2", ("ranks=[4,8]", "alpha=2")),
        ('fedavg@codec=["top_k:0.1","int8"]', 'fedavg@codec=["top_k:0.1","int8"]', None),
        ('fedavg@classes={"a":{"lr":1},"b":{}},lr=2', None, (CLASSES, "lr=2")),
        ("flora@flora.energy=0.9", "flora@flora.energy=0.9", ("flora.energy=0.9",)),
    ],
)  # fmt: skip
def test_a_name_with_settings(
    text: str, label: str | None, settings: tuple[str, ...] | None
) -> None:
    found = contender(text)
    assert label in (None, found.label)
    assert settings in (None, found.settings)


def test_a_file_of_ones_own_may_be_in_a_folder_with_that_sign(tmp_path: Path) -> None:
    folder = tmp_path / "x@y"
    folder.mkdir()
    code = (
        "from corolla.strategies.fedavg import FedAvg\n\n\nclass Mine(FedAvg):\n    name = '{}'\n"
    )
    (folder / "mine.py").write_text(code.format("part way/2"))
    found = contender(f"{folder}/mine.py:Mine@lr=1")
    assert found.strategy == f"{folder}/mine.py:Mine"
    assert found.label == "part way/2@lr=1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fedavg@", "expected NAME or NAME@key=value"),
        ("@lr=1", "expected NAME or NAME@key=value"),
        ("fedavg@lr=1,", "after @ and each comma, found \"\""),
        ("fedavg@lr=1,rank", "after @ and each comma, found \"rank\""),
        ("fedavg@start=pissa,flora@lr=1", "\"flora@lr=1\" is another contender: put a space"),
        ("fedavg@lr=", "after @ and each comma"),
        ("fedavgg@lr=1", "did you mean 'fedavg'"),
        ("fedavg@seed=1", "seed is the same for all that are compared"),
        ("fedavg@eval-examples=1", "eval_examples is the same for all"),
        ("fedavg@partition=iid", "partition is the same for all"),
        ("fedavg@cohort=2", "cohort is the same for all"),
        ("fedavg@strategy=flora", "strategy is the same for all"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        contender(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_files_are_safe_and_each_another() -> None:
    labels = ["fedavg", "fedavg@lr=0.1,rank=4", "Mine", "mine", "a/b", "a_b", "x" * 200, "../up"]
    found = file_names(labels)
    assert found["fedavg"] == "fedavg"
    assert found["fedavg@lr=0.1,rank=4"] == "fedavg@lr=0.1,rank=4"
    assert len({name.casefold() for name in found.values()}) == len(labels)
    assert all("/" not in name and not name.startswith(".") for name in found.values())
    assert max(map(len, found.values())) <= 80


def test_a_contender_is_the_run_with_the_same_settings(settings: Settings) -> None:
    given = {"model": settings().model, "data": settings().data, "rank": 2}
    grid = make_grid(
        ["fedavg", "fedavg@rank=4,lr=0.5", "flora@max-length=32"][:2],
        options=given,
        settings=["rounds=2", "alpha=3"],
        jobs=1,
    )
    first, other = grid.methods
    assert first.config == load(None, {**given, "strategy": "fedavg"}, ["rounds=2", "alpha=3"])
    wanted = load(
        None,
        {"model": given["model"], "data": given["data"], "strategy": "fedavg"},
        ["rounds=2", "alpha=3", "rank=4", "lr=0.5"],
    )
    assert other.config == wanted
    assert other.lrs == pytest.approx((0.5 / 3, 0.5, 1.5), rel=5e-3)
    assert len(first.lrs) == len(other.lrs)


def test_rates_are_given_once_and_privacy_of_one_allows_one_rate_for_all() -> None:
    with pytest.raises(ConfigError, match=r"--lrs names the rates of all, fedavg@lr=0\.5 one of"):
        make_grid(["fedavg", "fedavg@lr=0.5"], lrs=[0.1])
    grid = make_grid(["fedavg", "fedavg@dp=example,epsilon=8"])
    assert [len(method.lrs) for method in grid.methods] == [1, 1]
    with pytest.raises(ConfigError, match="fedavg@rank=4 is named twice"):
        make_grid(["fedavg@rank=4", "fedavg@rank=4"])


def test_baselines_are_named() -> None:
    assert [own.label for own in baselines("local, global")] == ["local", "global"]
    assert baselines("") == []
    with pytest.raises(ConfigError, match="--with all: expected local or global, found 'all'"):
        baselines("all")


def test_with_baselines_all_are_measured_on_clients_that_train() -> None:
    local, whole = make_grid(["fedavg", *baselines("local,global")], options={"cohort": 3}).methods[
        1:
    ]
    assert (local.config.cohort, whole.config.cohort) == (3, None)
    assert whole.config.pooled and not local.config.pooled
    assert whole.config.eval_participants
    assert [method.describe()["strategy"] for method in (local, whole)] == ["local", "fedavg"]
    with pytest.raises(ConfigError, match="dp=client"):
        make_grid(["fedavg", *baselines("global")], options={"dp": "client", "epsilon": 8.0})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)


def configs(grid: ComparisonGrid) -> dict[str, RunConfig]:
    return {method.label: grid.search(method)[0].config for method in grid.methods}


def test_with_one_client_alone_and_together_are_the_same_bits(
    quick: None, settings: Settings, federation_file: Path, tmp_path: Path
) -> None:
    """A mean of one is that one: the federation, the client alone, and one with all rows."""
    rows = [line for line in federation_file.read_text().splitlines() if '"cyd"' in line]
    (tmp_path / "one.jsonl").write_text("\n".join(rows) + "\n")
    shared = {k: v for k, v in settings().model_dump().items() if k in ("model", "rank", "lr")}
    given = {**shared, "data": str(tmp_path / "one.jsonl"), "rounds": 3, "local_steps": 2}
    small = ["max-length=48", "threads=1", "device=cpu", "batch-size=3"]
    grid = make_grid(
        ["fedavg", *baselines("local,global")], options=given, settings=small, lrs=[0.01]
    )
    found = {}
    for label, config in configs(grid).items():
        summary = in_process.simulate(config, tmp_path / label)
        own = summary.folder / "clients" / "cyd" / "adapter"
        info = json.loads((summary.folder / "run.json").read_text())
        bits = adapter_hash(own) if label == "local" else summary.adapter_hash
        scores = {when: info["clients"]["cyd"][when] for when in ("base", "final")}
        found[label] = (bits, scores)
        assert scores["final"]["loss"] < scores["base"]["loss"]
    assert found["local"] == found["fedavg"] == found["global"]


def test_a_contender_that_differs_in_nothing_ends_in_the_same_bits(
    quick: None, settings: Settings, tmp_path: Path
) -> None:
    config = settings()
    given = {"model": config.model, "data": config.data, "rank": 2, "rounds": 1, "cohort": 2}
    small = ["max-length=48", "threads=1", "device=cpu", "local-steps=1", "eval-clients=1"]
    grid = make_grid(
        ["fedavg", "fedavg@quorum=0.5"], options=given, settings=small, lrs=[0.01], seeds=1
    )
    hashes = {
        in_process.simulate(config, tmp_path / label).adapter_hash
        for label, config in configs(grid).items()
    }
    assert len(hashes) == 1


def test_one_client_has_the_rows_of_all_and_nothing_else_changes(settings: Settings) -> None:
    apart, pooled = federated.load(settings()), federated.load(settings(pooled=True, cohort=None))
    assert list(pooled.clients) == ["all"]
    assert pooled.heldout == apart.heldout
    (whole,) = pooled.clients.values()
    assert list(whole.train) == [row for split in apart.clients.values() for row in split.train]
    assert {row.text for row in whole.eval[: len(apart.clients)]} == {
        split.eval[0].text for split in apart.clients.values()
    }
    assert len(whole.eval) == sum(len(split.eval) for split in apart.clients.values())
