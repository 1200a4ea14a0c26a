"""Ranks and scalings of single modules: against peft's own patterns, in a round, and as saved."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import ConfigError, ModelError
from corolla.estimates import footprint
from corolla.models import anatomy, pretrained, trainable
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.models.patterns import Patterns
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.round import run_round
from corolla.storage.memory import Memory
from corolla.types import Adapter, LoraSpec, Params
from tests.corolla.models.test_dense import Devices
from tests.strategies import tiny

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(4, 8.0)
RANKS = {"q_proj": 2, "mlp.down_proj": 6, "model.layers.0.self_attn.v_proj": 1}
ALPHAS = {"q_proj": 3.0, "up_proj": 1.0}
PATTERNS = Patterns(RANKS, ALPHAS)


def lora(patterns: Patterns | None = PATTERNS) -> LoraModel:
    return LoraModel(tiny.base("llama"), patterns=patterns)


def by_peft(params: Params) -> Any:
    """The same adapter as peft makes it of its own rank_pattern and alpha_pattern."""
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern=RANKS, alpha_pattern=ALPHAS, task_type="CAUSAL_LM",
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    )  # fmt: skip
    model = get_peft_model(tiny.base("llama").model, config).eval()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].weight.data = params[name + ".lora_A"].clone()
            module.lora_B["default"].weight.data = params[name + ".lora_B"].clone()
    return model


def test_each_module_has_the_rank_and_the_scaling_that_peft_gives_it() -> None:
    model = lora()
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    theirs = by_peft(params)
    torch.testing.assert_close(tiny.logits(model.model), tiny.logits(theirs), rtol=0, atol=1e-6)
    wanted = tiny.peft_weights(theirs)
    found = model.deltas()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-7) for n in wanted)
    ranks = {n: t.shape[0] for n, t in params.items() if n.endswith("lora_A")}
    layer = "model.layers.0."
    assert ranks == {
        **{
            f"{layer}self_attn.{n}_proj.lora_A": r
            for n, r in zip("qkvo", (2, 4, 1, 4), strict=True)
        },
        **{f"{layer}mlp.{n}_proj.lora_A": r for n, r in (("gate", 4), ("up", 4), ("down", 6))},
    }
    model.write(params, dataclasses.replace(SPEC, rslora=True))
    assert not torch.allclose(tiny.logits(model.model), tiny.logits(theirs), atol=1e-4)


def test_other_modules_start_with_the_bits_that_they_have_without_patterns() -> None:
    own, usual = lora().init(SPEC, 3), lora(None).init(SPEC, 3)
    same = {n for n in usual if own[n].shape == usual[n].shape and torch.equal(own[n], usual[n])}
    assert {n.split(".")[-2] for n in usual.keys() - same} == {"q_proj", "down_proj", "v_proj"}
    assert lora(Patterns()).init(SPEC, 3).keys() == own.keys()


def test_of_several_names_the_longest_counts() -> None:
    patterns = Patterns({"q_proj": 2, "0.self_attn.q_proj": 3, "proj": 5}, {"m": 1.0})
    assert patterns.spec("model.layers.0.self_attn.q_proj", SPEC) == LoraSpec(3, 8.0)
    assert patterns.spec("model.layers.1.self_attn.q_proj", SPEC) == LoraSpec(2, 8.0)
    assert patterns.spec("model.layers.1.self_attn.k_proj", SPEC) is SPEC
    assert patterns.spec("m", SPEC) == LoraSpec(4, 1.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_has_one_rank_and_is_the_same_model_to_plain_peft(
    tmp_path: Path, rslora: bool
) -> None:
    """Smaller modules are padded: servers of models know no ranks by module."""
    spec, model = dataclasses.replace(SPEC, rslora=rslora), lora()
    params = tiny.adapter(model, spec, 1)
    model.save(tmp_path / "adapter", Adapter(params), spec)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    model.write(params, spec)
    assert model.distance_to(tmp_path / "adapter", spec) < 1e-6
    loaded = adapter_files.load_adapter(tiny.base("llama").model, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.model), rtol=0, atol=1e-5)
    model.write({n: t + 0.01 for n, t in params.items()}, spec)
    assert model.distance_to(tmp_path / "adapter", spec) > 1e-3


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedavg", {}),
        ("fedavg", {"codec_down": ["top_k:0.5"], "codec": ["top_k:0.5"]}),
        ("fedavg", {"dp": "example", "epsilon": 8.0}),
        ("fisher", {}),
        ("seed_pool", {"eps": 0.01}),
    ],
)
def test_a_round_moves_all_modules_in_as_many_bytes_as_they_have(
    strategy: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny.config(strategy, cohort=4, rank_pattern=RANKS, alpha_pattern=ALPHAS, **changes)
    model = lora(Patterns.of(config))
    network = Devices(Worker(config, model, tiny.data("llama"), Memory(tmp_path)), False)
    built = build_strategy(config)
    first = model.init(config.lora, seeds.derive(config.seed, "init"))
    state = built.init(first, config.seed)
    fresh = cache(lambda spec: model.init(spec, 0))
    origin = seedlog.origin(model.base.fingerprint, state)
    federation = Federation("0" * 32, config, built, tiny.CLIENTS, fresh, origin)
    result = run_round(RoundCall(federation, state, {}, 1), network)
    assert not result.dropped
    assert result.traffic.up == result.cost.up
    after = built.adapter(result.state)
    model.show(after, config.lora)
    moved = {n: bool(t.any()) for n, t in model.deltas().items()}
    assert all(moved.values())
    if not changes and strategy == "fedavg":
        sizes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
        sizes |= {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
        ranks = {**dict.fromkeys(sizes, 4), "q": 2, "v": 1, "down": 6}
        each = sum(ranks[n] * (out + into) for n, (out, into) in sizes.items())
        assert result.traffic.up == result.traffic.down == 4 * 4 * each
        means: dict[str, Tensor] = {}
        total = sum(result.num_examples.values())
        for client, n in result.num_examples.items():
            for name, tensor in network.trained[client].items():
                means[name] = means.get(name, torch.zeros(())) + n / total * tensor.double()
        for name, tensor in means.items():
            torch.testing.assert_close(after.trained[name].double(), tensor, rtol=0, atol=1e-6)


def test_the_formula_counts_what_is_built(tiny_model: Path, settings: Settings) -> None:
    config = settings(rank=2, rank_pattern={"q_proj": 4, "k_proj": 1}, alpha_pattern={"v_proj": 1})
    model = trainable.build(config, pretrained.load(config))
    shapes = footprint.trained_shapes(anatomy.read(str(tiny_model)), config)
    built = {n: tuple(t.shape) for n, t in model.init(config.lora, 0).items()}
    assert {n: tuple(s) for n, s in shapes.items()} == built
    assert sum(map(math.prod, shapes.values())) != sum(
        map(
            math.prod,
            footprint.trained_shapes(anatomy.read(str(tiny_model)), settings(rank=2)).values(),
        )
    )
    odd = settings(rank_pattern={"query": 4})
    for refuse in (
        lambda: trainable.build(odd, pretrained.load(odd)),
        lambda: footprint.trained_shapes(anatomy.read(str(tiny_model)), odd),
    ):
        with pytest.raises(ModelError, match="query match no module of"):
            refuse()
    with pytest.raises(ModelError, match="rank 40 is larger than module"):
        LoraModel(tiny.base("llama"), patterns=Patterns({"q_proj": 40})).check_rank(SPEC)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *[
            ({"strategy": name}, "reckons with one for all: use fedavg")
            for name in (
                "flora",
                "fedex_lora",
                "flexlora",
                "hetlora",
                "fed_sb",
                "ffa_lora",
                "rolora",
            )
        ],
        *[
            ({"strategy": name}, "reckons with one for all")
            for name in ("fedsvd", "lora_fair", "fedsa_lora", "feddpa")
        ],
        ({"parameters": "bias"}, "are those of LoRA adapters: parameters=bias has none"),
        ({"start": "gradient", "public": "x.jsonl"}, "for random factors, found start=gradient"),
    ],
)
def test_patterns_are_refused_where_one_rank_is_reckoned_with(
    changes: dict[str, Any], told: str
) -> None:
    for pattern in ({"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4.0}}):
        with pytest.raises(ConfigError, match=told) as error:
            build_strategy(RunConfig(**pattern, **changes))
        assert "\n" not in str(error.value)
