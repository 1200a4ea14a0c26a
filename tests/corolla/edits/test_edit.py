"""`corolla edit` on folders: what it writes, and that a mistake leaves nothing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands.edit import edit
from corolla.config.run import RunConfig
from corolla.edits.grammar import FORMS
from corolla.models import pretrained
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.types import Adapter, LoraSpec
from corolla.wire import codec
from tests.strategies import tiny

Settings = Callable[..., RunConfig]


@pytest.fixture
def adapters(settings: Settings, tmp_path: Path) -> list[Path]:
    """Two adapters of a model on disk, of ranks 2 and 3."""
    model = LoraModel(pretrained.load(settings()))
    folders = []
    for number, spec in enumerate((LoraSpec(2, 4.0), LoraSpec(3, 3.0))):
        folder = tmp_path / f"adapter-{number}"
        model.save(folder, Adapter(tiny.adapter(model, spec, number)), spec)
        folders.append(folder)
    return folders


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["edit", *map(str, arguments)])


def one_line(done: Any) -> str:
    """The refusal of a command."""
    (found,) = done.stderr.splitlines()
    return str(found)


def logits(model: Path, adapters: Sequence[tuple[Path, float]]) -> torch.Tensor:
    """Those of a model with adapters added to its weights, in fp64, times numbers."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    weights = dict(base.named_parameters())
    for folder, number in adapters:
        plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        tuned = PeftModel.from_pretrained(plain, str(folder))
        for name, layer in tuned.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weights[f"{name}.weight"].data += number * layer.get_delta_weight("default").data
    with torch.no_grad():
        found: torch.Tensor = base(torch.arange(2, 26).reshape(2, 12)).logits
    return found


def test_the_edited_adapter_loads_in_peft(
    adapters: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "both"
    done = run(*adapters, "--steps", "scale:2 weights:0.5,-1", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rank"] == 5
    wanted = logits(tiny_model, [(adapters[0], 1.0), (adapters[1], -2.0)])
    assert torch.allclose(logits(tiny_model, [(out, 1.0)]), wanted, atol=1e-5)
    record = json.loads((out / "edit.json").read_text())
    assert record["steps"] == ["scale:2", "weights:0.5,-1"]
    assert [own["sha256"] for own in record["adapters"]] == [
        adapter_files.adapter_hash(folder) for folder in adapters
    ]
    assert record["error"] == 0
    assert "Made by `corolla edit` of 2 adapters" in (out / "README.md").read_text()
    assert adapter_files.base_of(out) == str(tiny_model)


def test_what_was_cut_is_told(adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run(*adapters, "--steps", "ties:0.5 rank:2", "--out", out)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "edit.json").read_text())
    assert f"rank 2, {record['error']:.2%} off" in " ".join(done.stdout.split())
    (cut,) = record["cuts"]
    assert cut["step"] == "rank:2"
    assert 0 < record["error"] == cut["error"] < max(cut["error_of_modules"].values())


def test_a_step_that_finds_nothing_says_so(
    adapters: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Two models that are the same have no directions to keep to: no module is changed."""
    out, steps = tmp_path / "same", f"scale:2 safe:{tiny_model},{tiny_model} rank:2"
    done = run(adapters[0], "--steps", steps, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["changed"][:2] == [found["modules"], 0]
    assert json.loads((out / "edit.json").read_text())["changed"] == found["changed"]
    told = edit.Edited("out", 2, 0.0, ["scale:2", "safe:a,b"], [4, 0], 4).line
    assert "safe:a,b changed 0 of 4 modules" in told and "scale" not in told


def test_text_of_a_user_is_shown_as_it_is(adapters: list[Path], tmp_path: Path) -> None:
    done = run(adapters[0], "--steps", "lines:abc:", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "lines:abc:" in done.output


def test_a_mistake_is_a_line_and_leaves_nothing(
    adapters: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    other, plain, turned = (tmp_path / name for name in ("other", "plain", "turned"))
    changes: list[tuple[Path, dict[str, str]]] = [
        (other, {"base_model_name_or_path": "else"}),
        (plain, {"bias": "all"}),
        (turned, {"init_lora_weights": "pissa_niter_4"}),
    ]
    for folder, change in changes:
        folder.mkdir()
        told = json.loads((adapters[0] / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**told, **change}))
        tensors = (adapters[0] / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    out = tmp_path / "out"
    cases: list[tuple[int, list[str | Path], str, str]] = [
        (2, [adapters[0]], "melt", "no such step"),
        (2, [adapters[0], other], "weights", "of several bases"),
        (1, [plain], "scale:2", "has bias=all"),
        (1, [turned], "scale:2", "belongs to a base that pissa_niter_4 has changed"),
        (1, [tiny_model], "scale:2", "is a whole model"),
        (1, [tmp_path / "none"], "scale:2", "is no adapter"),
        (1, [other], "intruders", "no model on this machine"),
        (1, [adapters[0]], f"safe:{tmp_path},{tiny_model}", "it has no config.json"),
    ]
    before = sorted(tmp_path.iterdir())
    for code, folders, steps, message in cases:
        done = run(*folders, "--steps", steps, "--out", out)
        assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    done = run(adapters[0], "--steps", "scale:2", "--out", tmp_path / "full")
    assert (done.exit_code, "is not empty" in done.stderr) == (2, True)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "full"])


def test_only_heads_of_the_same_labels_are_combined(adapters: list[Path], tmp_path: Path) -> None:
    folders = []
    for number, folder in enumerate(adapters):
        run_folder = tmp_path / f"run-{number}"
        run_folder.mkdir()
        folder.rename(run_folder / "adapter")
        path = run_folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
        labels = ["no", "yes"] if number else ["yes", "no"]
        (run_folder / "run.json").write_text(json.dumps({"config": {}, "labels": labels}))
        folders.append(run_folder)
    done = run(*folders, "--steps", "weights", "--out", tmp_path / "out")
    assert (done.exit_code, "has the labels yes, no" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_help_explains_every_step() -> None:
    shown = " ".join(run("--help").stdout.split())
    assert [form.written for form in FORMS.values() if form.written not in shown] == []


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"r": 0}, {}, "has r=0"),
        ({"r": "x"}, {}, "is no adapter"),
        ({"r": None}, {}, "is no adapter"),
        ({"lora_alpha": float("inf")}, {}, "lora_alpha=inf"),
        ({"r": 5}, {}, "its configuration has r=5"),
        ({"lora_bias": True}, {}, "has lora_bias=True"),
        ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens"),
        ({"task_type": "SEQ_CLS"}, {}, "has no head"),
        ({"base_model_name_or_path": None}, {}, "--model"),
        ({}, {A: None}, "has model.layers.0.self_attn.q_proj.lora_B and no"),
        ({}, {A: torch.ones(3)}, "is of shape (3,)"),
        ({}, {A: float("nan")}, "not finite"),
        ({}, {"base_model.model.m.lora_embedding_A": torch.ones(2, 2)}, "lora_embedding_A"),
    ],
)
def test_an_adapter_that_is_broken_or_more_than_factors_is_refused_in_a_line(
    adapters: list[Path], tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    path = adapters[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    file = str(adapters[0] / "adapter_model.safetensors")
    held = dict(codec.read(file)[0])
    for name, value in tensors.items():
        if value is None:
            del held[name]
        else:
            held[name] = torch.full_like(held[name], value) if isinstance(value, float) else value
    codec.write(file, held, {"format": "pt"})
    done = run(adapters[0], "--steps", "scale:0.5", "--out", tmp_path / "new")
    assert done.exit_code == 1
    assert said in one_line(done)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "steps", ["scale:inf", "weights:inf", "lines:0.5,inf", "ties:1,inf rank:2"]
)
def test_infinite_numbers_are_refused(adapters: list[Path], tmp_path: Path, steps: str) -> None:
    done = run(adapters[0], "--steps", steps, "--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "found 'inf'" in one_line(done)


@pytest.mark.parametrize("steps", ["scale:1e39", "scale:1e308 rank:1", "weights:1e200 ties rank:1"])
def test_what_fp32_cannot_hold_is_not_written(
    adapters: list[Path], tmp_path: Path, steps: str
) -> None:
    done = run(adapters[0], "--steps", steps, "--out", tmp_path / "new")
    assert done.exit_code == 1
    assert "too large for fp32" in one_line(done)
    assert not (tmp_path / "new").exists()
