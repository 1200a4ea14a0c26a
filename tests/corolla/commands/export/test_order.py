"""`corolla export` of adapters: merged weights in a stream, smaller ranks, cards, a hub."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from corolla.artefacts import adapters
from corolla.artefacts.demands import max_lora_rank, unmet
from corolla.commands.export.order import Order, export
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ConfigError
from corolla.models import pretrained
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.tensors import factors
from corolla.types import Adapter, LoraSpec
from tests.corolla.artefacts import hub

Settings = Callable[..., RunConfig]


def adapter_of(settings: Settings, folder: Path, rank: int, rslora: bool = False) -> Path:
    """An adapter far from zero, saved as a run does."""
    model = LoraModel(pretrained.load(settings()))
    spec = LoraSpec(rank, 3.0, rslora)
    noise = torch.Generator().manual_seed(3)
    params = {
        name: torch.randn(tensor.shape, generator=noise)
        for name, tensor in model.init(spec, 1).items()
    }
    model.save(folder, Adapter(params), spec)
    model.base.tokenizer.save_pretrained(folder)
    return folder


def base_of(settings: Settings, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(settings().model, dtype=dtype)


def dense(base: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The update of each module by peft alone."""
    model = PeftModel.from_pretrained(base, str(folder))
    return {
        name.removeprefix(adapter_files.PREFIX): layer.get_delta_weight("default").double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_merged_model_is_streamed_file_by_file(
    dtype: str, settings: Settings, tmp_path: Path
) -> None:
    base = base_of(settings, torch.float32)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    adapter = adapter_of(settings, tmp_path / "adapter", 4)
    plain = {n: t.double() for n, t in base.state_dict().items()}
    (line,) = export(
        Order(adapter, "merged", str(tmp_path / "base"), tmp_path / "out", dtype=dtype)
    )
    kind = getattr(torch, dtype)
    wanted = {f"{name}.weight": update for name, update in dense(base, adapter).items()}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=kind)
    lost = total = 0.0
    for name, found in merged.state_dict().items():
        exact = plain[name] + wanted.get(name, 0)
        torch.testing.assert_close(found, exact.to(kind), rtol=1e-6, atol=1e-6)
        if name in wanted:
            lost += float((found.double() - exact).square().sum())
            total += float(wanted[name].square().sum())
    assert f"rounding to {dtype} takes {(lost / total) ** 0.5:.2%} of the update" in line
    names = [path.name for path in sorted((tmp_path / "base").glob("*.safetensors*"))]
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors*"))] == names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_no_more_than_a_part_of_a_tensor_is_in_memory(settings: Settings, tmp_path: Path) -> None:
    """Of a model of 24 MB in fp32; what torch holds outside of Python is not counted."""
    adapter = adapter_of(settings, tmp_path / "adapter", 4)
    large = {f"extra.{i}": torch.ones(2048, 1024) for i in range(3)}
    folder = tmp_path / "base"
    base_of(settings, torch.float32).save_pretrained(folder)
    save_file(large, folder / "more.safetensors", {"format": "pt"})
    tracemalloc.start()
    try:
        export(Order(adapter, "merged", str(folder), tmp_path / "out", dtype="bfloat16"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # numpy's arrays are counted: a million values in fp32, twice
    found = load_file(tmp_path / "out" / "more.safetensors")
    assert all(torch.equal(found[n], t.bfloat16()) for n, t in large.items())


def test_a_smaller_rank_is_the_best_one(settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 6, rslora=True)
    (line,) = export(Order(adapter, "adapter", out=tmp_path / "small", rank=2))
    exact = dense(base_of(settings, torch.float32), adapter)
    small = dense(base_of(settings, torch.float32), tmp_path / "small")
    lost = total = 0.0
    for name, update in exact.items():
        u, s, vt = torch.linalg.svd(update)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        torch.testing.assert_close(small[name], best, rtol=1e-5, atol=1e-5)
        lost, total = lost + float(s[2:].square().sum()), total + float(s.square().sum())
    assert f"rank 2, {(lost / total) ** 0.5:.2%} off in effective weights" in line
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2.0, False)
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    card = (tmp_path / "small" / "README.md").read_text()
    assert "its rank is 2, servers take 8 to 256" in card


def test_rank_stabilisation_is_baked_into_alpha(settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 6, rslora=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(3.0 / 6**0.5, rel=1e-15)


def test_the_base_is_named_without_a_path_of_this_machine(
    settings: Settings, tmp_path: Path
) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 2)
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name.startswith("../")
    assert not Path(name).is_absolute()
    assert adapter_files.base_of(adapter) == settings().model
    assert adapter_files.portable("owner/name", tmp_path) == "owner/name"
    assert adapter_files.portable("/models/mine", Path("/runs/x")) == "mine"
    assert adapter_files.portable("/home/models/mine", Path("/home/x")) == "../models/mine"


def saved(settings: Settings, folder: Path, rank: int) -> adapters.SavedLora:
    return adapters.read_lora(adapter_of(settings, folder, rank))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"spec": LoraSpec(300, 1.0)}, "its rank is 300, servers take 8 to 256: corolla export"),
        ({"spec": LoraSpec(4, 1.0)}, "its rank is 4, servers take 8 to 256: pad it"),
        ({"spec": LoraSpec(8, 1.0, rslora=True)}, "rank-stabilised"),
        ({"heads": {"score.weight": torch.ones(1)}}, "modules_to_save"),
        ({"config": {"modules_to_save": ["score"], "base_model_name_or_path": "x"}}, "a head"),
        ({"config": {"rank_pattern": {"q": 4}, "base_model_name_or_path": "x"}}, "rank_pattern"),
        ({"config": {"base_model_name_or_path": "/home/ada/model"}}, "a path of one machine"),
        ({"config": {"base_model_name_or_path": None}}, "a path of one machine"),
        ({"update": {"q.lora_magnitude_vector": torch.ones(1)}}, "no name of peft's LoRA"),
    ],
)
def test_what_servers_demand_is_checked(
    change: dict[str, Any], told: str, settings: Settings, tmp_path: Path
) -> None:
    found = unmet(replace(saved(settings, tmp_path / "adapter", 8), **change))
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_the_rank_that_vllm_must_allow() -> None:
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 64, 88, 512, 513)] == [
        *(8, 8, 16, 64, 128, 512, None)
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora=True: only plain LoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "is of type IA3"),
    ],
)
def test_other_adapters_are_refused(
    change: dict[str, Any], told: str, settings: Settings, tmp_path: Path
) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 2)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for order in (Order(adapter, "adapter", rank=1), Order(adapter, "merged", dtype="bfloat16")):
        with pytest.raises(ArtefactError, match=told):
            export(replace(order, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 2)
    with pytest.raises(ArtefactError, match=r"is 16 x 24, .*: it was trained on another"):
        export(Order(adapter, "merged", "embedded", tmp_path / "out", dtype="bfloat16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("order", "told"),
    [
        (Order(Path("x"), "gguf", dtype="bfloat16"), "of --to gguf there is f32, f16, q8_0"),
        (Order(Path("x"), "adapter", dtype="f16"), "an adapter keeps its own"),
        (Order(Path("x"), "adapter", push="name"), "expected OWNER/NAME"),
        (Order(Path("x"), "adapter", push="a/b"), "HF_HUB_OFFLINE forbids"),
    ],
)
def test_orders_without_sense_are_refused(order: Order, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        export(order)


def test_a_run_without_a_result_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtefactError, match="has no result yet"):
        export(Order(tmp_path, "merged"))


@pytest.mark.command
def test_an_adapter_is_sent_to_a_hub(settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(settings, tmp_path / "adapter", 8)
    command = ["export", str(adapter), "--to", "adapter", "--out", str(tmp_path / "out")]
    with hub.serving() as there:
        known = {"HF_ENDPOINT": there.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "token"}
        done = subprocess.run(
            [sys.executable, "-m", "corolla", *command, "--push", "ada/tuned"],
            env={**os.environ, **known, "HF_HUB_DISABLE_TELEMETRY": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert there.made == ["ada/tuned"]
    assert there.files == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()
    }
    assert "README.md" in there.files


def test_factors_of_a_cut_keep_their_heads(settings: Settings, tmp_path: Path) -> None:
    exact = replace(saved(settings, tmp_path / "adapter", 6), heads={"score.weight": torch.ones(2)})
    small, error = adapters.cut(exact, 3)
    assert small.heads is exact.heads
    assert 0 < error < 1
    assert factors.rank(small.update) == small.spec.rank == 3
    assert adapters.cut(exact, 6) == (exact, 0.0)
