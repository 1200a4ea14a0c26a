"""The share of a model that is trained, and experts that stay frozen."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KINDS
from corolla.estimates import footprint
from corolla.models import anatomy, pretrained, trainable
from corolla.models.dense import DenseModel
from corolla.models.experts import reach
from corolla.models.lora import LoraModel
from corolla.server.runs.setup import set_up
from tests.conftest import byte_tokenizer
from tests.corolla.models import checkpoints
from tests.corolla.models.experts import mixtures
from tests.strategies import tiny


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_an_adapter_on_linear_layers_leaves_fused_experts_frozen(kind: str) -> None:
    base = mixtures.base(kind)
    named = {name: p.numel() for name, p in base.model.named_parameters()}
    attention = sum(n for name, n in named.items() if "_proj.weight" in name)
    experts = {n: size for n, size in named.items() if n.endswith(("gate_up_proj", "down_proj"))}
    parts = reach.parts(base.model)
    found = reach.of(parts, trainable.sizes(LoraModel(base)))
    assert (found.values, found.parameters) == (attention, sum(named.values()))
    assert list(found.frozen_experts) == sorted(experts)
    assert found.frozen_values == sum(experts.values())
    part = sum(experts.values()) / sum(named.values())
    assert found.experts.startswith(f"fused experts stay frozen, {part:.0%} of the model's")
    assert "model.layers.0.mlp.experts.down_proj" in found.experts
    assert f"{attention:,} of {sum(named.values()):,} parameters are reached" in found.line


def test_layers_whose_weights_are_reached_are_counted() -> None:
    parts = reach.parts(tiny.base("llama").model)
    blocks = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    found = reach.of(parts, trainable.sizes(LoraModel(tiny.base("llama"))))
    assert found.values == blocks
    assert found.parameters == blocks + 64 * 32 + 3 * 32
    assert (found.experts, found.tied) == ("", [])
    scaled = reach.of(parts, trainable.sizes(DenseModel(tiny.base("llama"), "ia3")))
    assert scaled.values == 2 * 16 * 32 + 48 * 32  # keys, values and the second layer
    assert reach.of(parts, None).share == 1.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parameters", KINDS)
def test_each_kind_reaches_what_the_plan_says_or_the_weights_that_it_moves(
    tmp_path: Path, parameters: str, tied: bool
) -> None:
    if parameters == "head" and tied:
        pytest.skip("a tied output layer is not trained alone")
    path = checkpoints.llama(tmp_path, tied) if parameters != "bias" else checkpoints.gpt2(tmp_path)
    tokens = ["a", "b"] if parameters == "lora" else []
    config = RunConfig(
        model=str(path), parameters=parameters, rank=2, new_tokens=tokens, max_length=64
    )
    base = pretrained.load(config, [])
    named = {name: p.numel() for name, p in base.model.named_parameters()}
    found = reach.of(reach.parts(base.model), trainable.sizes(trainable.build(config, base)))
    wanted = 0
    for name, shape in footprint.trained_shapes(anatomy.read(str(path)), config).items():
        layer, _, last = name.rpartition(".")
        if last != "lora_B":
            wanted += named[f"{layer}.weight"] if last in ("lora_A", "ia3") else math.prod(shape)
    assert 0 < found.values == wanted
    assert found.parameters == sum(named.values())
    shared = tied and parameters in ("lora", "embeddings", "full")
    assert ("lm_head.weight" in found.tied) is shared


def test_a_tied_output_layer_is_named() -> None:
    parts = reach.parts(tiny.base("llama").model)
    found = reach.of(parts, trainable.sizes(DenseModel(tiny.base("llama"), "embeddings")))
    assert (found.values, found.tied) == (64 * 32, ["lm_head.weight"])
    assert found.line.endswith("; tied to what is trained: lm_head.weight")
    assert reach.Reach(**found.to_json()) == found
    assert dataclasses.replace(found, tied=[]).line.endswith("%")


def test_a_convolution_is_no_expert() -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.MambaForCausalLM(config)
    assert any(p.dim() == 3 for p in model.parameters())
    assert reach.parts(model).experts == frozenset()


@pytest.mark.parametrize(("parameters", "warned"), [("lora", True), ("full", False)])
def test_a_run_tells_its_share_and_warns_of_frozen_experts(
    settings: Callable[..., RunConfig], tmp_path: Path, parameters: str, warned: bool
) -> None:
    mixtures.model("mixtral", vocab_size=258).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    facts = set_up(settings(model=str(tmp_path / "model"), parameters=parameters), None).facts
    found = reach.Reach(**facts["reach"])
    assert 0 < found.values <= found.parameters
    assert (found.share == 1.0) is (parameters == "full")
    told = [own["text"] for own in facts["warnings"] if own["id"] == "experts"]
    assert [text.startswith("fused experts stay frozen") for text in told] == [True] * warned
