"""Going on from an adapter in a folder: whatever its rank, scaling and modules, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from corolla.commands.simulate.in_process import simulate
from corolla.config.load import validate
from corolla.errors import ArtefactError, ConfigError, ModelError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.starts import table
from corolla.tensors import tree
from corolla.types import Adapter, LoraSpec, Params
from tests.strategies import tiny


def saved(folder: Path, kind: str = "llama", **given: Any) -> Any:
    """A model of peft with a trained adapter, as it was saved to `folder`."""
    torch.random.manual_seed(3)
    usual = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(tiny.base(kind).model, LoraConfig(**{**usual, **given}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return model.eval()


def begun(folder: Path, kind: str = "llama", **changes: Any) -> tuple[LoraModel, Params]:
    """(a model, the start that a run of rank 4 and scaling 2 makes of the folder)."""
    config = tiny.config("fedavg", start=str(folder), **changes)
    model = LoraModel(tiny.base(kind), config.target_modules)
    made = table.begin(model, model.init(config.lora, 5), config)
    assert made.block is None
    model.write(made.trained, config.lora)
    return model, made.trained


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("llama", {}),
        ("llama", {"r": 4, "use_rslora": True}),
        ("llama", {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 1}}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_a_run_goes_on_from_the_same_model(
    kind: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """Of another rank and alpha, by pattern, with rank stabilisation, on other modules."""
    theirs = tiny.logits(saved(tmp_path / "adapter", kind, **given))
    model, _ = begun(tmp_path / "adapter", kind)
    assert torch.allclose(tiny.logits(model.model), theirs, atol=1e-5)
    assert float((theirs - tiny.logits(tiny.base(kind).model)).abs().max()) > 1e-3


def test_all_of_the_rank_can_be_trained(tmp_path: Path) -> None:
    """Rows of A beyond the folder's are fresh, beside zeros in B; so are modules that it lacks."""
    saved(tmp_path / "adapter")
    model, start = begun(tmp_path / "adapter")
    fresh = model.init(LoraSpec(4, 8.0), 5)
    for module in model.shapes:
        a, b = module + ".lora_A", module + ".lora_B"
        known = 2 if module.endswith(("q_proj", "down_proj")) else 0
        assert torch.equal(start[a][known:], fresh[a][known:])
        assert not start[b][:, known:].any()
        assert bool(start[b][:, :known].any()) == bool(known)


def test_the_adapter_of_a_run_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    model = tiny.lora_model("bert")
    spec = LoraSpec(4, 8.0)
    before = tiny.adapter(model, spec, 1)
    model.save(tmp_path / "adapter", Adapter(before), spec)
    _, start = begun(tmp_path / "adapter", "bert")
    assert tree.digest(start) == tree.digest(before)


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"r": 8}, {}, "has rank 8 on .*_proj, the run 4: set rank=8"),
        ({}, {"target_modules": ["q_proj"]}, "down_proj, .*the run has none: set target-modules"),
        ({"use_dora": True}, {}, "magnitudes of DoRA"),
        ({"bias": "lora_only"}, {}, "trains biases"),
        (
            {"modules_to_save": ["norm"]},
            {},
            r"norm\.weight.*modules_to_save: norm.*is not trained: no run goes on",
        ),
    ],
)
def test_what_a_run_cannot_go_on_from_is_refused_by_name(
    given: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter", **given)
    with pytest.raises(ModelError, match=message):
        begun(tmp_path / "adapter", **changes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of IA3, not of LoRA"),
        ({"init_lora_weights": "pissa"}, "belongs to a base that pissa has changed"),
        ({"alora_invocation_tokens": [1]}, "tokens that switch it on"),
    ],
)
def test_settings_that_mean_another_model_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(ModelError, match=message):
        begun(tmp_path / "adapter")


def test_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match=r"c_attn, .*; the run has none"):
        begun(tmp_path / "adapter")


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is no adapter"):
        begun(tmp_path)
    with pytest.raises(ArtefactError, match="is no adapter"):
        begun(tmp_path / "gone")
    with pytest.raises(ConfigError, match="or a folder with an adapter, found 'elsewhere'"):
        validate({"start": "elsewhere"})


def test_a_folder_that_is_gone_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> Any:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr(pretrained, "load", loaded)
    config = validate({"start": str(tmp_path / "gone"), "rounds": 1})
    with pytest.raises(ArtefactError, match=r"gone is no adapter: there is no such folder$"):
        simulate(config, tmp_path / "out")


def test_the_folder_of_a_run_is_its_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "adapter")
    with pytest.raises(ArtefactError, match=r"no adapter_config\.json, use start=.*run/adapter$"):
        begun(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert validate({"start": str(tmp_path / "run")}).start == str(tmp_path / "run" / "adapter")


def test_a_folder_is_remembered_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert validate({"start": "mine"}).start == str(tmp_path / "mine")
