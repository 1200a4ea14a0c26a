"""An adapter for each expert is that of plain peft, and of weights that are added densely."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from corolla.client.training.dpsgd import Clipper
from corolla.client.training.first_order import FirstOrder
from corolla.commands import artefacts
from corolla.commands.export.merged import export_merged
from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KINDS
from corolla.data.encoding import Encoded
from corolla.errors import ArtefactError, ConfigError, ModelError
from corolla.estimates import footprint
from corolla.models import anatomy, kinds, pretrained, trainable
from corolla.models.experts import fused
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.types import Adapter, LoraSpec, Params
from tests.conftest import byte_tokenizer
from tests.corolla.models.experts import mixtures
from tests.strategies import tiny

SPEC = LoraSpec(2, 3.0)
TARGETS = ("experts.gate_up_proj", "down_proj")
EXPERTS = "model.layers.0.mlp.experts"
BATCH = [Encoded(tuple(range(2 + i, 12 + i)), tuple(range(2 + i, 12 + i))) for i in range(3)]


def built(kind: str, targets: Sequence[str] = TARGETS) -> LoraModel:
    return LoraModel(mixtures.base(kind), experts=targets)


def moved(model: LoraModel, seed: int = 1) -> Params:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.init(SPEC, 0).items()
    }


def in_dense_weights(kind: str, deltas: Mapping[str, Tensor]) -> Any:
    """The plain model with the updates of all layers and experts added to its weights."""
    plain = mixtures.model(kind)
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            if f"{name}.weight" in named:
                named[f"{name}.weight"] += delta
            else:
                tensor, _, expert = name.rpartition(".")
                named[tensor][int(expert)] += delta.T if kind == "gpt_oss" else delta
    return plain


def product(own: Params, name: str) -> Tensor:
    return own[f"{name}.lora_B"].double() @ own[f"{name}.lora_A"].double()


def by_hand(params: Params, *blocks: Params) -> dict[str, Tensor]:
    """The updates of all modules, in fp64."""
    names = [name.removesuffix(".lora_A") for name in params if name.endswith(".lora_A")]
    return {
        name: SPEC.scaling * product(params, name)
        + sum((product(block, name) for block in blocks), torch.zeros(()))
        for name in names
    }


@pytest.mark.parametrize("kind", mixtures.KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_those_of_dense_weights_and_of_plain_peft(
    kind: str, frozen: bool, tmp_path: Path
) -> None:
    model = built(kind)
    untouched = tiny.logits(mixtures.model(kind))
    model.write(model.init(SPEC, 0), SPEC)
    assert torch.equal(tiny.logits(model.model), untouched)
    params = moved(model)
    assert sum(".experts." in name for name in params) == 2 * 2 * mixtures.EXPERTS
    blocks = (moved(model, 2),) if frozen else ()
    model.write(params, SPEC, blocks)
    found, wanted = tiny.logits(model.model), by_hand(params, *blocks)
    dense = tiny.logits(in_dense_weights(kind, wanted))
    assert float((found - untouched).abs().max()) > 0.1
    torch.testing.assert_close(found, dense, rtol=0, atol=2e-5)
    for name, delta in model.deltas().items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "adapter", Adapter(params, blocks), SPEC)
    assert model.distance_to(tmp_path / "adapter", SPEC) < 1e-7
    other = adapter_files.load_adapter(mixtures.model(kind), tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(other), found, rtol=0, atol=2e-5)
    merged = adapter_files.merge(other)
    torch.testing.assert_close(tiny.logits(merged), found, rtol=0, atol=2e-5)
    model.write({name: tensor + 0.1 for name, tensor in params.items()}, SPEC, blocks)
    assert model.distance_to(tmp_path / "adapter", SPEC) > 1e-3


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_gradients_are_those_of_dense_weights(kind: str) -> None:
    """∂L/∂A_e = s · B_eᵀ · ∂L/∂W_e by autograd of the plain model; one step of SGD at rate 1."""
    model = built(kind)
    start = moved(model)
    config = tiny.config(
        "fedavg", optimizer="sgd", lr=1.0, local_steps=1, batch_size=3, clip_norm=None
    )
    fit = FirstOrder(model, SPEC, BATCH, config, 0, 1).fit(start)
    plain = in_dense_weights(kind, by_hand(start))
    leaves = {name: leaf.requires_grad_() for name, leaf in plain.named_parameters()}
    ids = torch.tensor([own.input_ids for own in BATCH])
    plain(input_ids=ids, labels=ids).loss.backward()
    for name in by_hand(start):
        tensor, _, expert = name.rpartition(".")
        if expert.isdecimal():
            gradient = leaves[tensor].grad[int(expert)]
            gradient = gradient.T if kind == "gpt_oss" else gradient
        else:
            gradient = leaves[f"{name}.weight"].grad
        a, b = start[f"{name}.lora_A"], start[f"{name}.lora_B"]
        for role, wanted in (
            (".lora_A", SPEC.scaling * b.T @ gradient),
            (".lora_B", SPEC.scaling * gradient @ a.T),
        ):
            found = start[name + role] - fit.params[name + role]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_training_is_that_of_plain_peft() -> None:
    """Three steps of AdamW; the factors of peft hold those of all experts."""
    model = built("qwen3_moe")
    start = moved(model)
    config = tiny.config("fedavg", lr=1e-2, local_steps=3, batch_size=3, clip_norm=None)
    found = FirstOrder(model, SPEC, BATCH, config, 0, 1).fit(start).params
    wanted = LoraConfig(
        r=2, lora_alpha=3.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=list(TARGETS), task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), adapter_files.peft_speaks_to_transformers():
        oracle = get_peft_model(mixtures.model("qwen3_moe"), wanted).eval()
    inside = oracle.base_model.model.model.layers[0].mlp.experts
    outer = {"down_proj": inside, "gate_up_proj": inside.base_layer}
    with torch.no_grad():
        for name, tensor in start.items():
            if ".experts." not in name:
                module, _, role = name.rpartition(".")
                layer = oracle.base_model.model.get_submodule(module)
                getattr(layer, role)["default"].weight.copy_(tensor)
        for tensor_name, layer in outer.items():
            for e in range(mixtures.EXPERTS):
                own = f"{EXPERTS}.{tensor_name}.{e}"
                layer.lora_A["default"].weight[2 * e : 2 * e + 2] = start[f"{own}.lora_A"]
                layer.lora_B["default"].weight[:, e :: mixtures.EXPERTS] = start[f"{own}.lora_B"]
    optimizer = torch.optim.AdamW(
        [p for p in oracle.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    ids = torch.tensor([own.input_ids for own in BATCH])
    for _ in range(3):
        optimizer.zero_grad()
        oracle(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    off = way = 0.0
    for tensor_name, layer in outer.items():
        for e in range(mixtures.EXPERTS):
            own = f"{EXPERTS}.{tensor_name}.{e}"
            a = layer.lora_A["default"].weight[2 * e : 2 * e + 2].detach()
            b = layer.lora_B["default"].weight[:, e :: mixtures.EXPERTS].detach()
            for role, tensor in ((".lora_A", a), (".lora_B", b)):
                off += float((found[own + role] - tensor).square().sum())
                way += float((start[own + role] - tensor).square().sum())
    assert way > 1e-2
    assert off < 1e-6 * way


def test_examples_have_gradients_of_their_own_under_privacy() -> None:
    """A clipped sum is that of plain backpropagation, an example at a time."""
    model = built("mixtral")
    model.write(moved(model), SPEC)
    trained = dict(model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    clipper = Clipper(model, trained, 3)
    with clipper.attached():
        found = clipper([[own] for own in BATCH], 1e-3)
    wanted = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained.items()}
    for own in BATCH:
        model.model.zero_grad()
        ids = torch.tensor([own.input_ids])
        model.model(input_ids=ids, labels=ids).loss.backward()
        grads = {name: p.grad.double() for name, p in trained.items() if p.grad is not None}
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        assert norm > 1e-3
        for name, gradient in grads.items():
            wanted[name] += gradient / norm
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(ModelError, match="target parameters w1 match nothing: its fused experts"):
        built("mixtral", ["w1"])
    with pytest.raises(ModelError, match="down_proj match nothing: it has no fused experts"):
        LoraModel(tiny.base("llama"), experts=["down_proj"])


def test_linear_layers_that_peft_takes_for_experts_are_left_out_or_refused() -> None:
    dense = {"num_hidden_layers": 2, "mlp_only_layers": [0]}
    model = LoraModel(mixtures.base("qwen3_moe", **dense))
    assert model.targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    model.write(model.init(SPEC, 0), SPEC)
    with pytest.raises(ModelError, match="up_proj are names of experts to peft in a qwen3_moe"):
        LoraModel(mixtures.base("qwen3_moe", **dense), ["q_proj", "gate_proj", "up_proj"])


@pytest.mark.parametrize("blocks", [None, "last:1"])
def test_blocks_are_chosen_and_saved(blocks: str | None, tmp_path: Path) -> None:
    own = mixtures.base("mixtral", num_hidden_layers=2)
    model = LoraModel(own, blocks=blocks, experts=["experts.down_proj"])
    params = moved(model)
    inside = {name.split(".")[2] for name in params}
    assert inside == ({"1"} if blocks else {"0", "1"})
    model.save(tmp_path / "adapter", Adapter(params), SPEC)
    model.write(params, SPEC)
    plain = mixtures.model("mixtral", num_hidden_layers=2)
    other = adapter_files.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(other), tiny.logits(model.model), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = tmp_path_factory.mktemp("mixtures")

    def of(kind: str) -> Path:
        if not (made / kind).exists():
            mixtures.model(kind, vocab_size=258).save_pretrained(made / kind)
            byte_tokenizer().save_pretrained(made / kind)
        return made / kind

    return of


@pytest.mark.parametrize("kind", mixtures.KINDS)
@pytest.mark.parametrize("targets", [None, list(TARGETS)])
def test_the_formula_counts_the_tensors_that_are_trained(
    folder: Callable[[str], Path], kind: str, targets: list[str] | None
) -> None:
    """From the files alone, in which Mixtral and Qwen have a tensor for each expert."""
    config = RunConfig(
        model=str(folder(kind)), target_parameters=targets, rank=2, max_length=16, device="cpu"
    )
    known = anatomy.read(str(folder(kind)))
    base = pretrained.load(config)
    sizes = {name: p.numel() for name, p in base.model.named_parameters()}
    model = trainable.build(config, base)
    shapes = footprint.trained_shapes(known, config)
    assert shapes == {n: tuple(t.shape) for n, t in model.init(config.lora, 0).items()}
    assert known.values == sum(sizes.values())
    every = sum(n for name, n in sizes.items() if name.endswith(("gate_up_proj", "down_proj")))
    assert fused.adapted(known.stacks(), config, "")[0] == (every if targets else 0)
    assert fused.used(known.stacks(), known.experts_per_token) == every // mixtures.EXPERTS * 2
    assert kinds.of(config) is kinds.FORMS[KINDS["lora"].name]


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_run_ends_in_an_adapter_that_another_process_loads(
    strategy: str,
    folder: Callable[[str], Path],
    settings: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    from corolla.commands.simulate.in_process import simulate

    config = settings(
        model=str(folder("mixtral")), strategy=strategy, target_parameters=["experts.down_proj"],
        rounds=1, cohort=2, local_steps=1,
    )  # fmt: skip
    summary = simulate(config, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    scores = artefacts.evaluate_adapter(adapter, None, None)
    assert scores["adapter"]["loss"] == pytest.approx(summary.final["loss"], abs=1e-5)
    if strategy == "fedavg":
        assert export_merged(adapter, None, tmp_path / "merged") < 1e-4
        with pytest.raises(ArtefactError, match="only plain LoRA is known"):
            artefacts_of(adapter)


def artefacts_of(adapter: Path) -> object:
    from corolla.artefacts.adapters import read_lora

    return read_lora(adapter)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parameters": "ia3"}, "target-parameters get LoRA adapters: parameters=ia3 has none"),
        ({"dropout": 0.1}, "dropout=0.1 does not go with target-parameters"),
        ({"start": "pissa"}, "start=pissa is for linear layers"),
        ({"budget": "flops:0.5"}, "budget chooses among linear layers"),
        ({"rank_pattern": {"q_proj": 4}}, "alpha-pattern are for linear layers: peft would read"),
        ({"quantization": "8bit"}, "target-parameters needs a base in full, found 8bit"),
    ],
)
def test_what_does_not_go_with_experts_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        RunConfig(**{"target_parameters": list(TARGETS), **settings})
    assert "\n" not in str(caught.value)
