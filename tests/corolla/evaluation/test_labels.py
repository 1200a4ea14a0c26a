"""Classifiers with a trained head, and folders whose parts do not fit each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from corolla.commands.artefacts import evaluate_adapter
from corolla.commands.export.merged import export_merged
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, ModelError
from corolla.evaluation.labels import ordered
from corolla.models import pretrained
from corolla.server.runs.setup import set_up
from tests.conftest import byte_tokenizer
from tests.corolla.models import checkpoints

Settings = Callable[..., RunConfig]


def classifier(folder: Path, *labels: str) -> str:
    """A checkpoint with a head for labels in this order."""
    names = dict(enumerate(labels))
    place = checkpoints.bert(folder)
    config = transformers.AutoConfig.from_pretrained(place)
    config.id2label, config.label2id = names, {label: i for i, label in names.items()}
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(place)
    return str(place)


def labelled(folder: Path, labels: str | list[str]) -> str:
    path = folder / "labelled.jsonl"
    rows = [
        {"client_id": f"c{i % 3}", "text": f"row {i} of text", "label": labels[i % len(labels)]}
        for i in range(36)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("known", "labels", "wanted"),
    [
        (["yes", "no", "perhaps"], ["no", "perhaps", "yes"], ["yes", "no", "perhaps"]),
        (["Yes", "No"], ["no", "yes"], ["yes", "no"]),
        (["a", "A"], ["A", "a"], ["a", "A"]),
        (["yes", "no", "perhaps"], ["no", "yes"], ["yes", "no", "perhaps"]),
        (["LABEL_0", "LABEL_1"], ["0", "1"], ["0", "1"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "2"], ["0", "LABEL_1", "2"]),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"]),
        (
            [f"LABEL_{i}" for i in range(11)],
            sorted(map(str, range(11))),
            [str(i) for i in range(11)],
        ),
    ],
)
def test_labels_are_in_the_order_of_the_checkpoint(
    settings: Settings, tmp_path: Path, known: list[str], labels: list[str], wanted: list[str]
) -> None:
    config = settings(model=classifier(tmp_path, *known))
    assert ordered(config, labels) == wanted
    fresh = config.model_copy(update={"new_head": True})
    assert ordered(fresh, labels) == labels
    assert ordered(settings(), labels) == labels  # no classifier at all
    assert ordered(config, []) == []


@pytest.mark.parametrize(
    ("known", "labels", "said"),
    [
        (["yes", "no"], ["ja", "nein"], "the model has 2 labels (yes, no), the data 2 labels (ja,"),
        (["yes", "no"], ["no", "perhaps", "yes"], "the data 3 labels (no, perhaps, yes)"),
        (["LABEL_0", "LABEL_1"], ["no", "yes"], "(LABEL_0, LABEL_1), the data 2 labels (no, yes)"),
        (["LABEL_0", "LABEL_1"], ["0", "1", "2"], "the model has 2 labels"),
        (["yes", "no"], ["0", "1"], "the data 2 labels (0, 1)"),
        (["yes", "no"], ["No", "no"], "and these are not the same"),
    ],
)
def test_labels_that_cannot_be_matched_are_refused_with_both_sizes(
    settings: Settings, tmp_path: Path, known: list[str], labels: list[str], said: str
) -> None:
    config = settings(model=classifier(tmp_path, *known))
    with pytest.raises(ModelError) as caught:
        ordered(config, labels)
    assert said in str(caught.value)
    assert "--set new-head=true" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trained_head_keeps_its_labels(settings: Settings, tmp_path: Path) -> None:
    """The accuracy of the untouched model is that of plain transformers, class by class."""
    model = classifier(tmp_path, "yes", "no", "perhaps")
    config = settings(model=model, data=labelled(tmp_path, ["no", "perhaps", "yes"]))
    loaded = set_up(config, None)
    assert loaded.evaluator.labels == ["yes", "no", "perhaps"]
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    assert plain.config.id2label == loaded.model.base.model.config.id2label
    tokenizer, right = byte_tokenizer(), 0
    for row in loaded.data.heldout:
        with torch.no_grad():
            ids = tokenizer(row.text, return_tensors="pt")["input_ids"]
            right += plain.config.id2label[int(plain(ids).logits.argmax())] == row.label
    adapter = loaded.model.init(config.lora, 0)
    score = loaded.evaluator.score(loaded.strategy.adapter(loaded.strategy.init(adapter, 0)))
    assert score["accuracy"] == right / len(loaded.data.heldout)


@pytest.mark.parametrize("number", [2, 3])
def test_a_new_head_on_request(settings: Settings, tmp_path: Path, number: int) -> None:
    """What the refusal recommends: it trains, is proven, exported and evaluated."""
    model = classifier(tmp_path, "yes", "no", "perhaps")
    labels = ["ja", "nein", "vielleicht"][:number]
    config = settings(model=model, data=labelled(tmp_path, labels), rounds=1, cohort=3)
    with pytest.raises(ModelError, match="begin a new head with --set new-head=true"):
        simulate(config, tmp_path / "refused")
    config = config.model_copy(update={"new_head": True})
    summary = simulate(config, tmp_path / "out")
    info = json.loads((summary.folder / "run.json").read_text())
    assert info["labels"] == labels
    assert info["config"]["new_head"] is True
    assert export_merged(summary.folder / "adapter", None, tmp_path / "merged") < 1e-3
    scores = evaluate_adapter(summary.folder / "adapter", None, None)
    assert scores["adapter"]["loss"] == pytest.approx(info["final"]["loss"], abs=1e-5)
    old, new = (load_file(Path(f) / "model.safetensors") for f in (model, tmp_path / "merged"))
    assert len(new["classifier.bias"]) == number
    assert not torch.equal(new["classifier.weight"], old["classifier.weight"][:number])


def test_a_whole_model_brings_its_new_head(settings: Settings, tmp_path: Path) -> None:
    model = classifier(tmp_path, "yes", "no", "perhaps")
    data = labelled(tmp_path, ["ja", "nein"])
    changes = {"parameters": "full", "new_head": True, "cohort": 3}
    summary = simulate(settings(model=model, data=data, rounds=1, **changes), tmp_path / "out")
    saved = load_file(summary.folder / "model" / "model.safetensors")
    assert len(saved["classifier.bias"]) == 2


def test_a_new_head_is_of_the_seed_alone(settings: Settings, tmp_path: Path) -> None:
    model = classifier(tmp_path, "yes", "no")
    made = [
        pretrained.load(settings(model=model, new_head=True, seed=seed), ["ja", "nein"])
        for seed in (1, 1, 2)
    ]
    first, again, other = (base.model.get_parameter("classifier.weight") for base in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {"classifier.weight", "classifier.bias"} <= made[0].missing
    assert len({base.stored for base in made}) == 1


def test_a_folder_of_model_and_adapter_is_refused_and_merged(
    settings: Settings, tmp_path: Path
) -> None:
    """The advice is followed: the adapter in a folder of its own, merged, is a model to train."""
    model = checkpoints.llama(tmp_path)
    config = settings(model=str(model), rounds=1)
    adapter = simulate(config, tmp_path / "run").folder / "adapter"
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        shutil.copy(adapter / name, model / name)
    with pytest.raises(ModelError, match="holds a model and an adapter") as caught:
        simulate(config, tmp_path / "nested")
    assert "--to merged" in str(caught.value)
    assert "\n" not in str(caught.value)
    own = tmp_path / "own"
    own.mkdir()
    for name in names:
        shutil.move(model / name, own / name)
    export_merged(own, str(model), tmp_path / "merged")
    simulate(config.model_copy(update={"model": str(tmp_path / "merged")}), tmp_path / "again")


def test_a_pad_token_that_the_model_does_not_know_is_no_matter(
    settings: Settings, tmp_path: Path
) -> None:
    """Padding is masked: the run is that of the same model without the token."""
    plain = checkpoints.llama(tmp_path)
    config = settings(model=str(plain), rounds=1)
    before = simulate(config, tmp_path / "before")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(plain)
    assert pretrained.load(config).pad_id == tokenizer.eos_token_id
    after = simulate(config, tmp_path / "after")
    assert after.adapter_hash == before.adapter_hash


def test_tokens_beyond_the_embeddings_are_refused_before_training(
    settings: Settings, tmp_path: Path
) -> None:
    model = checkpoints.llama(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["ada"])
    tokenizer.save_pretrained(model)
    config = settings(model=str(model), rounds=1)
    with pytest.raises(ModelError) as caught:
        simulate(config, tmp_path / "refused")
    assert "has 259 tokens, the model embeddings for 258" in str(caught.value)
    assert "model.resize_token_embeddings(259)" in str(caught.value)
    resized: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
    resized.resize_token_embeddings(259)
    resized.save_pretrained(model)
    simulate(config, tmp_path / "out")


def test_labels_are_no_matter_to_a_run_on_text(settings: Settings, tmp_path: Path) -> None:
    assert ordered(settings(task="causal"), ["b", "a"]) == ["b", "a"]
    with pytest.raises(ConfigError, match="true or false"):
        settings(new_head="new")
