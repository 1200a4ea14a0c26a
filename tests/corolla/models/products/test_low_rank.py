"""Our pass through a layer with LoRA, against peft's own under torch's autograd."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla.models.products import low_rank

INTO, OUT, NAME = 24, 20, "default"
Block = tuple[Tensor, Tensor] | None


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(base: nn.Module, rank: int, **options: Any) -> tuple[Any, Any]:
    """Two equal layers with LoRA, by peft alone, with no factor of zeros."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["m"],
        fan_in_fan_out=isinstance(base, Conv1D),
        **options,
    )
    plain: Any = nn.Sequential(OrderedDict(m=base))
    layer = get_peft_model(plain, config).base_model.model.m
    layer.lora_A[NAME].weight.data = random(rank, INTO, seed=1)
    layer.lora_B[NAME].weight.data = random(OUT, rank, seed=2)
    layer.base_layer.requires_grad_(False)
    return layer, copy.deepcopy(layer)


def gradients(layer: Any, x: Tensor, block: Block = None, seed: int = 3) -> dict[str, Tensor]:
    """The result, and the gradients of all that has some; `block` is added here, dense."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_(True)
    y = layer(x)
    if block is not None:
        y = y + (x.float() @ (block[1] @ block[0]).T).to(y.dtype)
    torch.autograd.backward([y], [random(*y.shape, seed=4)])
    factors = {"a": layer.lora_A[NAME].weight, "b": layer.lora_B[NAME].weight}
    found = {n: p.grad for n, p in factors.items() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], most: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name] - tensor).norm() <= most * tensor.norm(), name


BASES: Mapping[str, Callable[[], nn.Module]] = {
    "bias": lambda: nn.Linear(INTO, OUT),
    "no bias": lambda: nn.Linear(INTO, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, INTO),
}


@pytest.fixture(params=[(3, 7), (30, 40)], ids=["by autograd", "by our own gradients"])
def x(request: pytest.FixtureRequest) -> Tensor:
    """Inputs on either side of the size from which gradients are our own."""
    found = random(*request.param, INTO, seed=5)
    assert (found.numel() >= low_rank._WORTH) == (request.param == (30, 40))
    return found


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("blocked", [False, True])
def test_results_and_gradients_are_those_of_peft(x: Tensor, kind: str, blocked: bool) -> None:
    torch.manual_seed(0)
    layer, plain = layers(BASES[kind](), rank=5)
    block = (random(3, INTO, seed=6), random(OUT, 3, seed=7)) if blocked else None
    low_rank.install({"m": layer}, NAME, lambda _: block)
    assert isinstance(layer.forward, low_rank.LowRank)
    near(gradients(layer, x), gradients(plain, x, block))
    with torch.no_grad():
        own = layer(x)
    assert (own - gradients(plain, x, block)["y"]).norm() <= 1e-6 * own.norm()


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_has_no_gradient(x: Tensor, frozen: str) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4)
    for own in (layer, plain):
        getattr(own, frozen)[NAME].weight.requires_grad_(False)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    found = gradients(layer, x)
    assert frozen[-1].lower() not in found
    near(found, gradients(plain, x))


def test_inputs_without_gradients_are_carried(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    for own in (layer, plain):
        torch.autograd.backward(own(x).square().sum())
    for factor in ("lora_A", "lora_B"):
        found, wanted = (getattr(own, factor)[NAME].weight.grad for own in (layer, plain))
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_masks_of_dropout_are_those_of_peft(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4, lora_dropout=0.5)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    near(gradients(layer.train(), x), gradients(plain.train(), x))
    assert not torch.allclose(gradients(layer, x)["y"], gradients(layer.eval(), x)["y"])


def test_nothing_of_a_block_is_dropped(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4, lora_dropout=0.5)
    block = (random(3, INTO, seed=6), random(OUT, 3, seed=7))
    low_rank.install({"m": layer}, NAME, lambda _: block)
    near(gradients(layer.train(), x), gradients(plain.train(), x, block))


def test_gradients_of_gradients_are_refused_rather_than_wrong() -> None:
    layer, _ = layers(nn.Linear(INTO, OUT), rank=4)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    (found,) = torch.autograd.grad(
        layer(random(900, INTO)).square().sum(), layer.lora_B[NAME].weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.backward(found.square().sum())


def test_another_adapter_that_is_active_is_the_one_that_counts(x: Tensor) -> None:
    layer, _ = layers(nn.Linear(INTO, OUT), rank=4)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    layer.update_layer("two", 2, lora_alpha=4, config=LoraConfig(r=2, init_lora_weights=False))
    layer.set_adapter("two")
    a, b = layer.lora_A["two"].weight, layer.lora_B["two"].weight
    wanted = layer.base_layer(x) + 2.0 * x @ (b @ a).T
    assert torch.allclose(layer(x), wanted, atol=1e-4)


def test_a_forward_pass_that_was_put_in_the_place_of_the_bases_is_called(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4)
    for own in (layer, plain):
        own.base_layer.forward = lambda rows, base=own.base_layer: -nn.Linear.forward(base, rows)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    near(gradients(layer, x), gradients(plain, x))


def test_a_base_in_half_precision_is_rounded_once(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT).bfloat16(), rank=4)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    found, wanted = gradients(layer, x.bfloat16()), gradients(plain, x.bfloat16())
    assert found["a"].dtype == torch.float32
    near({n: found[n] for n in "ab"}, {n: wanted[n] for n in "ab"})
    near({n: found[n] for n in "yx"}, {n: wanted[n] for n in "yx"}, 2**-8)


class _Linear4bit(nn.Linear):
    """As a quantised layer: its result is no fresh tensor, and may not be written into."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = super().forward(x)
        return self.given


@pytest.mark.parametrize("hooked", [False, True])
def test_what_another_base_has_computed_stays_as_it_is(x: Tensor, hooked: bool) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT) if hooked else _Linear4bit(INTO, OUT), rank=4)
    if hooked:
        layer.base_layer.register_forward_hook(lambda m, _, y: setattr(m, "given", y))
    low_rank.install({"m": layer}, NAME, lambda _: None)
    near(gradients(layer, x), gradients(plain, x))
    given = layer.base_layer.given.detach().view(*x.shape[:-1], OUT)
    assert torch.allclose(
        given, nn.functional.linear(x, plain.base_layer.weight, plain.base_layer.bias)
    )


def test_hooks_on_a_factor_see_what_goes_through_it(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4)
    block = (random(3, INTO, seed=6), random(OUT, 3, seed=7))
    low_rank.install({"m": layer}, NAME, lambda _: block)
    seen: list[Tensor] = []
    hook = layer.lora_B[NAME].register_forward_hook(lambda _, args, y: seen.append(y))
    near(gradients(layer, x), gradients(plain, x, block))
    hook.remove()
    assert [tuple(y.shape) for y in seen] == [(*x.shape[:-1], OUT)]


def test_an_adapter_that_is_switched_off_or_merged_is_none(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4)
    low_rank.install({"m": layer}, NAME, lambda _: None)
    with torch.no_grad():
        whole = plain(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), plain.base_layer(x))
        layer.enable_adapters(True)
        layer.merge()
        assert torch.allclose(layer(x), whole, atol=1e-4)


def test_a_variant_of_lora_keeps_the_pass_of_peft(x: Tensor) -> None:
    layer, plain = layers(nn.Linear(INTO, OUT), rank=4, use_dora=True)
    block = (random(3, INTO, seed=6), random(OUT, 3, seed=7))
    low_rank.install({"m": layer}, NAME, lambda _: block)
    assert not isinstance(layer.forward, low_rank.LowRank)
    near(gradients(layer, x), gradients(plain, x, block))
