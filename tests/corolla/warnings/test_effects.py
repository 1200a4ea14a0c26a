"""Settings without effect: every key is refused, told, or changes what a run does."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from corolla.commands.simulate import in_process
from corolla.config.keys import CLASSES, OPTIONS, Key, table
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.server.runs import evaluate, proof, run
from corolla.server.runs.proof import Proof
from corolla.warnings.effects import EFFECTS, without_effect

Settings = Callable[..., RunConfig]

KEYS = {key.name: key for key in table()}
ELSEWHERE = {
    **dict.fromkeys(("quorum", "attempts", "max_norm", "max_seconds"), "when something fails"),
    **dict.fromkeys(("smallest_sum", "sum_corrupt"), "when members are lost"),
    "secure_sum": "in cohorts of more than two",
    **dict.fromkeys(("deadline", "wait", "max_examples"), "over Flower, or with devices"),
    **dict.fromkeys(("device", "threads", "engine"), "where the run is, not what it does"),
    **dict.fromkeys(("micro_batch_size", "gradient_checkpointing"), "memory"),
    **dict.fromkeys(("model", "data", "availability", "splits"), "in a file"),
    "quantization": "needs bitsandbytes",
    **dict.fromkeys(("layers", "budget", "scores"), "in models of more than one block"),
    "target_parameters": "in models with fused experts",
    "new_tokens": "in models with rows for them",
    "options": "a table of options, which are keys of their own",
    "task": "its example is what these rows are taken for anyway",
}
"""Key → where it acts: nothing of the small run here shows it."""
RUNS: dict[str, dict[str, Any]] = {
    "columns": {"columns": {"prompt": "response", "response": "prompt"}},
    "max_length": {"max_length": 16},
    "served_rank": {"served_rank": 1},
    "clip_norm": {"clip_norm": 1e-3},
    "target_loss": {"target_loss": 100.0},
    "patience": {"patience": 1, "lr": 1e-12},
    "min_examples": {"min_examples": 7},
    "max_norm": {"max_norm": 1e-6},
    "eval_clients": {"eval_clients": 0},
    "eval_examples": {"eval_examples": 2},
    "clients": {"clients": 2, "cohort": 2},
    "rank": {"rank": 3},
    "warmup_rounds": {"warmup_rounds": 2},
    "robust": {"robust": "median"},
    "pooled": {"pooled": True, "cohort": None},
}
"""Key → values that show in the small run what its example would show in a larger one."""


def told(*settings: str, deployed: bool = False) -> list[str]:
    return [idle.key for idle in without_effect(load(None, {}, list(settings)), deployed)]


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_no_key_is_told_of_where_it_has_an_effect(key: Key) -> None:
    """Beside what its example needs: over Flower for those that only act there."""
    distant = ELSEWHERE.get(key.name) == "over Flower, or with devices"
    other = ["classes.other.share=1"] if key.name.endswith(".share") else []
    low = ["fedmezo.directions=low_rank"] if key.name.startswith("fedmezo.") else []
    assert told(*key.settings, *other, *low[: "directions" not in key.name], deployed=distant) == []


def test_a_default_is_no_setting() -> None:
    for strategy in ("fedavg", "seed_pool"):
        for deployed in (False, True):
            config = load(None, {"strategy": strategy})
            assert [*without_effect(config, deployed)] == []
            stored = RunConfig.model_validate(config.model_dump())  # as a resumed run has it
            assert [*without_effect(stored, deployed)] == []
    assert told("dp=example", "epsilon=8") == []


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("eps=0.1", "eps=0.1 (it is for zeroth-order clients, and those of strategy fedavg"),
        ("strategy=seed_pool optimizer=sgd", "optimizer=sgd (it is for first-order clients"),
        ("local_epochs=1 local_steps=3", "local-steps=3 (local-epochs=1 decides how many"),
        ("dp=example epsilon=8 clip_norm=0.5", "clip-norm=0.5 (dp=example clips each example's"),
        ("dp=client epsilon=8 eval_clients=4", "eval-clients=4 (with dp=client nothing is"),
        ("secure_sum=true smallest_sum=2 eval_clients=4", "eval-clients=4 (with secure-sum=true"),
        ("eval_clients=0 eval_client_examples=4", "eval-client-examples=4 (eval-clients=0"),
        ("strategy=feddpa eval_participants=true", "eval-participants=True (strategy feddpa alw"),
        ("parameters=ia3 rank=4", "rank=4 (it is for adapters, and parameters=ia3 has none)"),
        ("parameters=sparse select=magnitude spectrum=9", "spectrum=9 (select=magnitude looks at"),
        (
            "parameters=sparse regrow=4 rounds=4 public=x.jsonl",
            "regrow=4 (no round follows in which other places",
        ),
        ("parameters=sparse rank=4 alpha=3", "alpha=3.0 (it is for adapters, and parameters=spa"),
        ("strategy=flora ranks=[4,8] rank=2", "rank=2 (ranks has those of all clients)"),
        ("strategy=flora ranks=[4,8] alphas=[1,2] alpha=3", "alpha=3.0 (alphas has those of all"),
        ("rounds=4 eval_every=2 patience=2", "patience=2 (the run has no more than 2 evaluations)"),
        ("classes.a.lr=0.1 classes.b.lr=0.2 lr=0.3", "lr=0.3 (every class of clients has its own"),
        ("classes.a.share=3", "classes.a.share=3 (all clients are of the only class)"),
        ("classes.a.local_steps=3 local_epochs=1", "classes.a.local_steps=3 (local-epochs=1"),
        ("strategy=fedmezo fedmezo.interval=4", "fedmezo.interval=4 (it is for directions of low"),
        ("data=. subset=main", "subset=main (only a set of the hub has configurations"),
        ("max_rank=9", "max-rank=9 (the state of strategy fedavg has a rank that does not grow)"),
        ("strategy=flexlora max_rank=9", "max-rank=9 (the state of strategy flexlora has a rank"),
        ("wait=9", "wait=9.0 (in this process every client answers at once)"),
    ],
)
def test_what_is_told_of_a_setting_without_effect(settings: str, wanted: str) -> None:
    (idle,) = without_effect(load(None, {}, settings.split()))
    assert f"{idle.setting} ({idle.why})".startswith(wanted)
    assert idle.instead


def test_what_acts_on_devices_only_is_told_elsewhere() -> None:
    assert told("deadline=9", "wait=9", "max_examples=9") == ["deadline", "wait", "max_examples"]
    assert told("deadline=9", "wait=9", "max_examples=9", deployed=True) == []
    assert told("engine=flower", "deadline=9") == []
    assert told("engine=flower", "deadline=9", deployed=True) == ["engine"]


def test_every_line_of_the_table_is_a_key() -> None:
    options = {key.name for key in KEYS.values() if key.group == OPTIONS}
    assert {*RunConfig.model_fields, *ClientClass.model_fields, *options} >= EFFECTS.keys()


def silent(key: Key) -> bool:
    """Returns whether the example is neither refused nor told of where nothing else is set."""
    try:
        return not told(key.settings[-1])
    except ConfigError:
        return False


SILENT = [key for key in KEYS.values() if silent(key) and key.group not in (CLASSES, OPTIONS)]


PROOF = Proof(0.0, 1e-4, 0.0, 1, 1, "PEFT", "float32", "none", 0)
"""The same of every run: it is not what is to differ."""


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """The files of the run without any setting, once it was made."""
    return {}


@pytest.mark.parametrize(
    "key", [key for key in SILENT if key.name not in ELSEWHERE], ids=lambda key: key.name
)
def test_what_is_neither_refused_nor_told_changes_the_run(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: dict[str, Any],
    key: Key,
) -> None:
    monkeypatch.setattr(evaluate.Evaluator, "samples", lambda self, adapter: [])
    monkeypatch.setattr(run, "OtherProcess", nullcontext)
    monkeypatch.setattr(proof, "prove", lambda judge, adapter, folder, other: PROOF)
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)
    usual: dict[str, Any] = {"rounds": 2, "cohort": 2, "local_steps": 1, "eval_client_examples": 2}
    if not small:
        small.update(done(settings(**usual), tmp_path / "usual"))
    given = RUNS.get(key.name, {key.name: key.example})
    assert done(settings(**{**usual, **given}), tmp_path / "run") != small


def done(config: RunConfig, folder: Path) -> Mapping[str, Any]:
    """Runs `config`; returns run.json and metrics.jsonl without its settings and clocks."""
    in_process.simulate(config, folder)
    info = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for clocked in (info, *lines):
        for name in ("seconds", "peak_rss", "config", "run_id", "warnings", "sampling_probability"):
            clocked.pop(name, None)
    return {"info": info, "lines": lines}
