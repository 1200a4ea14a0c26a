"""Starts against peft, where it is right, and else against their identities in fp64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corolla.config.run import RunConfig
from corolla.errors import DataError, ModelError
from corolla.evaluation import scoring, weight_gradients
from corolla.models.lora import LoraModel
from corolla.starts import corda, decomposition, loftq, material, table
from corolla.starts.table import Started
from corolla.tensors import factors, tree
from corolla.types import Params
from tests.corolla.starts.test_gradient import (
    dense_gradients,
    labels,
    mean_loss,
    public,
    sequences,
)
from tests.strategies import tiny

OFFSET = ("pissa", "pissa_2", "olora", "lora_ga", "corda_ipm", "corda_kpm")
ROWS = ("lora_ga", "corda_ipm", "corda_kpm", "eva")
RANK, SCALING = 4, 2.0


def settings(start: str, folder: Path, kind: str = "llama", **changes: Any) -> RunConfig:
    """A run with a start; rows are five, of different lengths."""
    given: dict[str, Any] = {"start": start, "micro_batch_size": 2, "weight_decay": 0.0}
    strategy = "fedavg"
    if start in ROWS:
        given["public"] = str(public(kind, folder))
    if start == "mica" or start.startswith("channels"):
        strategy = "ffa_lora"
        given["options"] = {"train": "A"} if start == "mica" else {}
    return tiny.config(strategy, **{**given, **changes})


def begun(
    config: RunConfig, kind: str = "llama", model: LoraModel | None = None
) -> tuple[LoraModel, Started]:
    """(the model, the start that a run makes of it)."""
    model = model or tiny.lora_model(kind)
    return model, table.begin(model, model.init(config.lora, 0), config, labels(kind))


def weight(kind: str, module: str) -> Tensor:
    """The (out, in) weight of the base in fp64."""
    found = tiny.base(kind).model.get_submodule(module).weight
    assert isinstance(found, Tensor)
    return (found.T if kind == "gpt2" else found).detach().double()


def product(params: Params, module: str) -> Tensor:
    """B A in fp64."""
    return params[module + ".lora_B"].double() @ params[module + ".lora_A"].double()


# What leaves the base stays beside it


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("start", OFFSET)
def test_a_start_with_its_block_is_the_base(start: str, kind: str, tmp_path: Path) -> None:
    config = settings(start, tmp_path, kind, rslora=kind == "gpt2")
    model, made = begun(config, kind)
    assert made.block is not None
    for module in model.shapes:
        total = product(made.block, module) + config.lora.scaling * product(made.trained, module)
        assert float(total.norm()) <= 1e-6 * float(weight(kind, module).norm()), module
        assert float(product(made.block, module).norm()) > 1e-4, module
    model.write(made.trained, config.lora, [made.block])
    apart = tiny.logits(model.model) - tiny.logits(tiny.base(kind).model)
    assert float(apart.abs().max()) < 1e-5


@pytest.mark.parametrize("start", ["orthogonal", "mica", "eva", "channels", "channels_small"])
def test_a_start_without_a_block_is_the_base(start: str, tmp_path: Path) -> None:
    config = settings(start, tmp_path)
    model, made = begun(config)
    assert made.block is None
    model.write(made.trained, config.lora)
    apart = tiny.logits(model.model) - tiny.logits(tiny.base("llama").model)
    assert float(apart.abs().max()) < 1e-6


@pytest.mark.parametrize("start", [*OFFSET, "orthogonal", "mica", "eva", "channels"])
def test_a_start_is_the_same_each_time_and_leaves_the_base_alone(
    start: str, tmp_path: Path
) -> None:
    config, model = settings(start, tmp_path), tiny.lora_model("llama")
    base = dict(model.base.model.named_parameters())
    before = tree.digest({n: t for n, t in base.items() if "lora_" not in n})
    torch.random.manual_seed(1)
    first = begun(config, model=model)[1]
    torch.random.manual_seed(2)
    again = begun(config, model=model)[1]
    assert tree.digest(first.trained) == tree.digest(again.trained)
    after = tree.digest({n: t for n, t in base.items() if "lora_" not in n})
    assert before == after
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


# Of weights


def by_peft(kind: str, start: str, model: LoraModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (A, B) as peft starts them."""
    given = LoraConfig(
        r=RANK,
        lora_alpha=int(SCALING * RANK),
        init_lora_weights=start,
        target_modules=list(model.shapes),
        fan_in_fan_out=kind == "gpt2",
    )
    made = get_peft_model(copy.deepcopy(tiny.base(kind).model), given)
    found = {}
    for module in model.shapes:
        layer = made.base_model.model.get_submodule(module)
        a, b = (own["default"].weight.detach() for own in (layer.lora_A, layer.lora_B))
        found[module] = a, b
    return found


@pytest.mark.parametrize(
    ("start", "kind"),
    [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama"), ("mica", "llama")],
)
def test_factors_of_weights_are_those_of_peft(start: str, kind: str, tmp_path: Path) -> None:
    """Up to the signs of columns, which no decomposition fixes."""
    model, made = begun(settings(start, tmp_path, kind), kind)
    for module, (a, b) in by_peft(kind, start, model).items():
        ours = made.trained[module + ".lora_A"], made.trained[module + ".lora_B"]
        signs = torch.sign((ours[1] * b).sum(0))
        assert float((ours[1] * signs - b).norm()) < 1e-4 * float(b.norm()), module
        assert float((ours[0] * signs[:, None] - a).norm()) <= 1e-4 * float(a.norm()), module
        assert torch.allclose(ours[1] @ ours[0], b @ a, atol=1e-6), module


def test_pissa_takes_the_largest_part_of_each_weight(tmp_path: Path) -> None:
    model, made = begun(settings("pissa", tmp_path))
    for module in model.shapes:
        u, s, vt = np.linalg.svd(weight("llama", module).numpy(), full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        found = SCALING * product(made.trained, module).numpy()
        assert np.linalg.norm(found - best) < 1e-5 * np.linalg.norm(best), module


def test_iterations_come_near_the_exact_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a matrix that is too large for an exact one, without being asked."""
    exact = begun(settings("pissa", tmp_path))[1]
    model, made = begun(settings("pissa_12", tmp_path))
    monkeypatch.setattr(decomposition, "LARGEST", 8)
    unasked = begun(settings("pissa", tmp_path))[1]
    for module in model.shapes:
        whole = product(exact.trained, module)
        for other in (made, unasked):
            apart = product(other.trained, module) - whole
            assert 0 < float(apart.norm()) < 0.02 * float(whole.norm()), module


def test_orthogonal_factors_have_no_product(tmp_path: Path) -> None:
    model, made = begun(settings("orthogonal", tmp_path))
    for module in model.shapes:
        a, b = made.trained[module + ".lora_A"], made.trained[module + ".lora_B"]
        assert float(product(made.trained, module).norm()) < 1e-6 * float(a.norm() * b.norm())
        assert int(torch.linalg.matrix_rank(a)) == int(torch.linalg.matrix_rank(b)) == RANK // 2
        assert 0.05 < float(a.std()) < 0.2


# Of gradients


def gradient_step(kind: str, config: RunConfig, made: Started, rate: float) -> Params:
    """What a step of SGD on both factors changes in each effective weight, in fp64."""
    assert made.block is not None
    model = tiny.lora_model(kind)
    model.write(made.trained, config.lora, [made.block])
    parameters = dict(model.parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    mean_loss(kind, model.model, sequences(kind, model.base, config)).backward()  # type: ignore[no-untyped-call]
    found = {}
    for module in model.shapes:
        (a, ga), (b, gb) = (
            (p.detach().double(), p.grad.double())
            for p in (parameters[module + role] for role in (".lora_A", ".lora_B"))
            if p.grad is not None
        )
        found[module] = config.lora.scaling * ((b - rate * gb) @ (a - rate * ga) - b @ a)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_step_of_lora_ga_is_that_of_whole_weights(kind: str, tmp_path: Path) -> None:
    """-η s² ζ² G_2r, where G_2r is the best approximation of the gradient of rank 2r."""
    config, rate = settings("lora_ga", tmp_path, kind), 1e-6
    model, made = begun(config, kind)
    moved, gradients = gradient_step(kind, config, made, rate), dense_gradients(kind, config)
    for module, (out, _) in model.shapes.items():
        u, s, vt = np.linalg.svd(gradients[module].double().numpy(), full_matrices=False)
        best = (u[:, : 2 * RANK] * s[: 2 * RANK]) @ vt[: 2 * RANK]
        wanted = -rate * SCALING**2 * (out**0.5 / 16) * best
        apart = np.linalg.norm(moved[module].numpy() - wanted)
        assert apart < 1e-3 * np.linalg.norm(wanted), module


def test_lora_ga_does_not_depend_on_the_scale_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("lora_ga", tmp_path)
    usual = begun(config)[1]
    right = scoring.loss_sum
    monkeypatch.setattr(weight_gradients, "loss_sum", lambda *given: 1024 * right(*given))
    scaled = begun(config)[1]
    for name, tensor in usual.trained.items():
        assert torch.allclose(scaled.trained[name].abs(), tensor.abs(), atol=1e-4), name


def test_lora_ga_needs_twice_the_rank(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 16: lower rank=12 to 8"):
        begun(settings("lora_ga", tmp_path, rank=12, alpha=24.0))


# Of inputs


def inputs(kind: str, config: RunConfig) -> dict[str, list[Tensor]]:
    """Module → the inputs (tokens, in) of each public row, in fp64, by hooks on the plain base."""
    base = tiny.base(kind)
    found: dict[str, list[Tensor]] = {module: [] for module in tiny.lora_model(kind).shapes}

    def keeping(rows: list[Tensor]) -> Callable[..., None]:
        return lambda module, given: rows.append(given[0].detach().double().flatten(0, -2))

    for module, rows in found.items():
        base.model.get_submodule(module).register_forward_pre_hook(keeping(rows))
    with torch.no_grad():
        for ids, _ in sequences(kind, base, config):
            base.model(input_ids=ids)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("start", ["corda_ipm", "corda_kpm"])
def test_corda_takes_the_end_of_the_weight_that_the_context_says(
    start: str, kind: str, tmp_path: Path
) -> None:
    """S B A C is W C's largest part, or its smallest; and U S Vᵀ C⁻¹ is the weight itself."""
    config = settings(start, tmp_path, kind)
    _, made = begun(config, kind)
    for module, rows in inputs(kind, config).items():
        moment = sum((x / x.abs().max()).T @ (x / x.abs().max()) for x in rows) / len(rows)
        assert isinstance(moment, Tensor)
        c = (moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))).numpy()
        whole = weight(kind, module).numpy() @ c
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        ends = slice(0, RANK) if start == "corda_ipm" else slice(len(s) - RANK, len(s))
        assert np.allclose((u * s) @ vt @ np.linalg.inv(c), weight(kind, module), atol=1e-10)
        found = SCALING * product(made.trained, module).numpy() @ c
        wanted = (u[:, ends] * s[ends]) @ vt[ends]
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(whole), module
        energy = np.linalg.norm(found) / np.linalg.norm(whole)
        assert abs(energy - np.sqrt(np.sum(s[ends] ** 2) / np.sum(s**2))) < 1e-5, module


def test_a_moment_is_damped_until_it_can_be_inverted() -> None:
    moment = torch.diag(torch.tensor([1.0, 1e-30, 0.0], dtype=torch.float64))
    damped, inverse = corda.inverted(moment, "m")
    assert torch.allclose(damped @ inverse, torch.eye(3, dtype=torch.float64), atol=0.05)
    assert float((damped - moment).diagonal().min()) == pytest.approx(0.01 / 3)
    with pytest.raises(ModelError, match="the inputs of m on the public rows are all zero"):
        corda.inverted(torch.zeros(3, 3, dtype=torch.float64), "m")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eva_spans_the_main_directions_of_the_inputs(kind: str, tmp_path: Path) -> None:
    config = settings("eva", tmp_path, kind)
    _, made = begun(config, kind)
    for module, rows in inputs(kind, config).items():
        _, _, vt = np.linalg.svd(torch.cat(rows).numpy(), full_matrices=False)
        a = made.trained[module + ".lora_A"].double().numpy()
        assert np.allclose(a @ a.T, np.eye(RANK), atol=1e-5), module
        assert np.allclose(a.T @ a, vt[:RANK].T @ vt[:RANK], atol=1e-4), module
        assert not made.trained[module + ".lora_B"].any()


def test_rows_of_a_client_are_refused_by_every_start_that_reads_rows(tmp_path: Path) -> None:
    for start in ROWS:
        config = settings(start, tmp_path)
        public("llama", tmp_path, client_id="ada")
        with pytest.raises(DataError, match=f"start={start} belong to no client"):
            begun(config)


# Of what quantisation lost


class Levels(nn.Module):
    """A linear layer whose weight is kept as 16 levels per block of 16, as bytes."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        blocks = whole.weight.detach().reshape(-1, 16)
        self.peak = nn.Parameter(blocks.abs().amax(1, keepdim=True), requires_grad=False)
        self.weight = (blocks / self.peak * 7).round().to(torch.int8)
        self.bias = whole.bias
        self.shape = whole.weight.shape
        self.out_features, self.in_features = self.shape

    @property
    def matrix(self) -> Tensor:
        return (self.weight.float() / 7 * self.peak).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix, self.bias)


def test_loftq_is_the_best_of_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """‖W - Q - s B A‖² is the sum of the squared singular values beyond the rank, at s = 2."""
    model, whole = tiny.lora_model("llama"), tiny.base("llama").model
    for module in model.shapes:
        layer: Any = model.model.base_model.model.get_submodule(module)
        layer.base_layer = Levels(layer.base_layer)
    monkeypatch.setattr(material.Material, "unquantised", whole)
    config = settings("loftq", tmp_path, quantization="4bit")
    made = begun(config, model=model)[1]
    assert made.block is None
    for module in model.shapes:
        quantised: Any = model.model.base_model.model.get_submodule(module).base_layer
        assert torch.allclose(
            loftq.computed(quantised, quantised.in_features), quantised.matrix, atol=1e-6
        )
        lost = weight("llama", module) - quantised.matrix.double()
        s = np.linalg.svd(lost.numpy(), compute_uv=False)
        left = lost - SCALING * product(made.trained, module)
        assert float(left.norm() ** 2) == pytest.approx(float(np.sum(s[RANK:] ** 2)), rel=1e-4)


# Of channels


@pytest.mark.parametrize("rows", [False, True])
def test_channels_train_as_whole_columns_or_rows_do(rows: bool, tmp_path: Path) -> None:
    """Five steps of SGD against a weight of which the other columns, or rows, get no gradient."""
    options = {"train": "A" if rows else "B"}
    config = settings(
        "channels", tmp_path, options=options, target_modules=["down_proj"], public=None
    )
    model = LoraModel(tiny.base("llama"), ["down_proj"])
    made = begun(config, model=model)[1]
    (module,) = model.shapes
    one_hot = made.trained[module + (".lora_B" if rows else ".lora_A")]
    chosen = (one_hot.T if rows else one_hot).nonzero()[:, 1]
    assert len(set(chosen.tolist())) == RANK
    data = tiny.config("fed_sb", start="gradient", public=str(public("llama", tmp_path)))
    base = tiny.base("llama")
    texts = sequences("llama", base, data)
    whole = base.model.get_submodule(module).weight.requires_grad_(True)
    before = whole.detach().clone()
    model.write(made.trained, config.lora)
    own = dict(model.parameters())[module + (".lora_A" if rows else ".lora_B")]
    own.requires_grad_(True)
    for _ in range(5):
        (g,) = torch.autograd.grad(mean_loss("llama", base.model, texts), [whole])
        (h,) = torch.autograd.grad(mean_loss("llama", model.model, texts), [own])
        with torch.no_grad():
            at: Any = (chosen, slice(None)) if rows else (slice(None), chosen)
            whole[at] -= 0.5 * g[at]
            own.sub_(0.5 * h)
    moved = whole.detach() - before
    assert float(moved.norm()) > 1e-3
    assert float((model.deltas()[module] - moved).norm()) < 1e-5 * float(moved.norm())


@pytest.mark.parametrize("start", ["channels_large", "channels_small"])
def test_channels_are_chosen_by_norm(start: str, tmp_path: Path) -> None:
    model, made = begun(settings(start, tmp_path))
    for module in model.shapes:
        norms = weight("llama", module).norm(dim=0)
        chosen = made.trained[module + ".lora_A"].nonzero()[:, 1]
        ranked = norms.argsort(descending=start == "channels_large")[:RANK]
        assert set(chosen.tolist()) == set(ranked.tolist()), module


def test_there_is_a_maker_for_each_start() -> None:
    from corolla.config.sections import starts

    assert table.MAKERS.keys() == {*starts.STARTS, starts.FOLDER.name}
    assert factors.A == ".lora_A"
