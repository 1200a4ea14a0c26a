"""Checkpoints that lack weights: trained and saved with the run, or refused by name before it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands import artefacts
from corolla.commands.export.merged import export_merged
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ModelError
from corolla.models import pretrained
from corolla.models.files import missing
from tests.corolla.models import checkpoints

Settings = Callable[..., RunConfig]
Make = Callable[[Path], Path]
LABELS = ["no", "perhaps", "yes"]
IDS = torch.arange(2, 26).reshape(2, 12)

# Nothing of Corolla: what README tells a user to do, under seeds of one's own.
PLAIN = """
import os, sys, torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification
adapter, out, *seeds = sys.argv[1:]
name = os.path.join(adapter, PeftConfig.from_pretrained(adapter).base_model_name_or_path)
ids = torch.arange(2, 26).reshape(2, 12)
found = {}
for seed in seeds:
    torch.manual_seed(int(seed))
    base = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=3, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        found[seed] = model(input_ids=ids).logits
save_file(found, out)
"""


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    rows = [
        {"client_id": f"c{i % 3}", "text": f"row {i} {'of' * (i % 5)}", "label": LABELS[i % 3]}
        for i in range(45)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(adapter: Path, folder: Path, *seeds: int) -> list[Tensor]:
    """Logits on IDS by transformers and peft alone, in a process of their own, for each seed."""
    out = folder / "logits.safetensors"
    command = [sys.executable, "-c", PLAIN, str(adapter), str(out), *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    return [found[str(seed)] for seed in seeds]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    ("make", "new"),
    [
        (checkpoints.masked_bert, ["bert.pooler"]),
        (checkpoints.masked_albert, ["albert.pooler"]),
        (checkpoints.masked_roberta, []),
        (checkpoints.bert, []),
        (checkpoints.llama, []),
    ],
)
def test_a_pooler_is_new_where_the_checkpoint_has_none(
    settings: Settings, tmp_path: Path, make: Make, new: list[str]
) -> None:
    base = pretrained.load(settings(model=str(make(tmp_path)), task="classify"), LABELS)
    head = "score" if make is checkpoints.llama else "classifier"
    assert pretrained.heads_of(base) == [head, *new]
    assert all(missing.within(name, [head, *new]) for name in base.missing)


@pytest.mark.parametrize("parameters", ["lora", "ia3"])
@pytest.mark.parametrize("make", [checkpoints.masked_bert, checkpoints.masked_albert])
def test_a_new_pooler_is_trained_and_saved(
    settings: Settings, tmp_path: Path, labelled: str, make: Make, parameters: str
) -> None:
    changes = {"target_modules": ["query", "dense"]} if parameters == "ia3" else {}
    model = str(make(tmp_path))
    config = settings(model=model, data=labelled, parameters=parameters, cohort=3, **changes)
    out = tmp_path / "run"
    summary = simulate(config, out)
    kind = next(name for name in ("bert", "albert") if name in load_names(out / "adapter"))
    brought = load_file(out / "adapter" / "adapter_model.safetensors")
    pooler = {n: t for n, t in brought.items() if n.startswith(f"base_model.model.{kind}.pooler")}
    assert len(pooler) == 2
    start = pretrained.load(config, LABELS).model.state_dict()
    moved = {n: t for n, t in pooler.items() if not torch.equal(t, start[n[17:]])}
    assert len(moved) == 2
    assert summary.proof.difference <= 1e-5
    found = [logits_under(seed, model, out / "adapter") for seed in (1, 2)]
    assert torch.equal(*found)
    assert float((found[0] - logits(pretrained.load(config, LABELS).model)).abs().max()) > 1e-3


def load_names(adapter: Path) -> set[str]:
    """The second parts of the names of an adapter's tensors."""
    return {name.split(".")[2] for name in load_file(adapter / "adapter_model.safetensors")}


def logits_under(seed: int, model: str, adapter: Path) -> Tensor:
    from peft import PeftModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSequenceClassification
        return logits(PeftModel.from_pretrained(auto.from_pretrained(model, num_labels=3), adapter))


@pytest.mark.command
def test_everybody_loads_the_same_model(settings: Settings, tmp_path: Path, labelled: str) -> None:
    """With plain transformers and peft, in processes of other seeds, as `corolla evaluate` does."""
    config = settings(model=str(checkpoints.masked_bert(tmp_path)), data=labelled, cohort=3)
    out = tmp_path / "run"
    simulate(config, out)
    one, other = plain(out / "adapter", tmp_path, 1, 2)
    assert torch.equal(one, other)
    merged = tmp_path / "merged"
    export_merged(out / "adapter", None, merged)
    auto = transformers.AutoModelForSequenceClassification
    torch.testing.assert_close(logits(auto.from_pretrained(merged)), one, rtol=0, atol=1e-5)
    told: list[str] = []
    scores = artefacts.evaluate_adapter(out / "adapter", None, None, tell=told.append)
    info = json.loads((out / "run.json").read_text())
    assert scores["adapter"] == pytest.approx(info["final"], rel=1e-5)
    assert len(told) == 1
    assert "bert.pooler.dense.weight" in told[0]
    assert "seed=0" in told[0]
    (out / "run.json").rename(tmp_path / "elsewhere.json")
    assert artefacts.labels_of(out / "adapter") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    alone = [
        artefacts.evaluate_adapter(out / "adapter", None, labelled, [f"seed={s}", "max-length=48"])
        for s in (3, 3)
    ]
    assert alone[0] == alone[1]


def test_another_seed_is_refused(settings: Settings, tmp_path: Path, labelled: str) -> None:
    """It would score rows that were trained on, and another base model."""
    simulate(settings(data=labelled, cohort=3, rounds=1), tmp_path / "run")
    command = ["evaluate", str(tmp_path / "run" / "adapter"), "--set", "seed=5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "seed=5 would hold out other examples" in result.stderr
    assert CliRunner().invoke(app, [*command[:-1], "seed=0"]).exit_code == 0


def test_an_adapter_without_a_pooler_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs have saved it before poolers were trained."""
    from corolla.models.lora import LoraModel
    from corolla.types import Adapter

    config = settings(model=str(checkpoints.masked_bert(tmp_path)), task="classify")
    with monkeypatch.context() as patch:
        patch.setattr(missing, "poolers", lambda model, names: [])
        patch.setattr(missing, "refuse", lambda *facts: None)
        model = LoraModel(pretrained.load(config, LABELS))
        model.save(tmp_path / "adapter", Adapter(model.init(config.lora, 0)), config.lora)
    base = pretrained.load(config, LABELS)
    with pytest.raises(ArtefactError, match=r"lacks bert\.pooler\.dense\.bias, bert\.pooler"):
        artefacts.tuned_of(tmp_path / "adapter", base)


def headless(folder: Path) -> Path:
    return checkpoints.llama(folder, tied=False, headless=True)


def without_a_norm(folder: Path) -> Path:
    return checkpoints.without(checkpoints.llama(folder), "model.norm.weight")


def without_a_layer(folder: Path) -> Path:
    return checkpoints.without(checkpoints.masked_bert(folder), "layer.1.attention.self.key.weight")


def half_a_pooler(folder: Path) -> Path:
    return checkpoints.without(checkpoints.bert(folder), "pooler.dense.weight")


@pytest.mark.parametrize("parameters", ["lora", "ia3", "bias", "full"])
@pytest.mark.parametrize(
    ("make", "task", "says"),
    [
        (
            checkpoints.of_another_class,
            "causal",
            r"lacks .*transformer\.h\.0.* and \d+ more; it has",
        ),
        (
            checkpoints.renamed,
            "causal",
            r"lacks .* and \d+ more; it has student\.lm_head\.weight",
        ),
        (without_a_norm, "causal", r"lacks model\.norm\.weight: random weights"),
        (without_a_layer, "classify", r"lacks bert\.encoder\.layer\.1\.attention\.self\.key"),
        (half_a_pooler, "classify", r"lacks bert\.pooler\.dense\.weight"),
    ],
)
def test_what_no_run_should_train_is_refused_by_name(
    settings: Settings, tmp_path: Path, make: Make, task: str, says: str, parameters: str
) -> None:
    config = settings(model=str(make(tmp_path)), task=task, parameters=parameters)
    labels = LABELS if task == "classify" else []
    with pytest.raises(ModelError, match=says) as caught:
        pretrained.load(config, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parameters", ["lora", "ia3", "prompt", "bias"])
def test_an_output_layer_that_is_not_trained_is_refused(
    settings: Settings, tmp_path: Path, parameters: str
) -> None:
    config = settings(model=str(headless(tmp_path)), parameters=parameters)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parameters", ["head", "full"])
def test_an_output_layer_that_is_trained_is_saved(
    settings: Settings, tmp_path: Path, parameters: str
) -> None:
    config = settings(model=str(headless(tmp_path)), parameters=parameters, rounds=1)
    out = tmp_path / "run"
    assert simulate(config, out).proof.reader == "transformers"
    assert "lm_head.weight" in load_file(out / "model" / "model.safetensors")
    info = json.loads((out / "run.json").read_text())
    scores = artefacts.evaluate_adapter(out / "model", None, None)
    assert scores["model"]["loss"] == pytest.approx(info["final"]["loss"], rel=1e-5)


def test_a_saved_model_that_lacks_something_is_refused(settings: Settings, tmp_path: Path) -> None:
    config = settings(model=str(headless(tmp_path)), parameters="head")
    with pytest.raises(ArtefactError, match=r"lacks lm_head\.weight"):
        artefacts.whole(headless(tmp_path), config, ())


@pytest.mark.parametrize("make", [checkpoints.llama, checkpoints.gpt2, checkpoints.bert])
def test_whole_checkpoints_have_one_hash(settings: Settings, tmp_path: Path, make: Make) -> None:
    labels = LABELS if make is checkpoints.bert else []
    base = pretrained.load(settings(model=str(make(tmp_path))), labels)
    assert base.missing == frozenset()
    assert base.stored == base.fingerprint


def test_the_hash_of_what_is_stored_depends_on_no_seed(settings: Settings, tmp_path: Path) -> None:
    model = str(checkpoints.masked_bert(tmp_path))
    one, other = (pretrained.load(settings(model=model, seed=s), LABELS) for s in (1, 2))
    assert one.stored == other.stored
    assert one.fingerprint != other.fingerprint


def test_a_refusal_names_three_tensors() -> None:
    names = [f"layer.{i}.weight" for i in range(5)]
    with pytest.raises(ModelError, match=re.escape("layer.2.weight and 2 more: random")):
        missing.refuse("m", names, [], [])
    missing.refuse("m", names, ["layer"], [])
    missing.refuse("m", [], [], ["a.b"])
