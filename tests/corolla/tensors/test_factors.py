from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from corolla import seeds
from corolla.tensors import factors, tree
from corolla.types import LoraSpec, Params, Size

OUT, INTO = 20, 12
SPECS = [LoraSpec(4, 8.0), LoraSpec(8, 4.0), LoraSpec(12, 60.0)]
P = [0.2, 0.5, 0.3]


def pair(rank: int, seed: int, out: int = OUT, into: int = INTO, module: str = "m") -> Params:
    generator = seeds.generator(seed, module, rank)
    return {
        f"{module}.lora_A": torch.randn(rank, into, generator=generator),
        f"{module}.lora_B": torch.randn(out, rank, generator=generator),
    }


def dense(params: Params, module: str = "m") -> Tensor:
    return params[f"{module}.lora_B"].double() @ params[f"{module}.lora_A"].double()


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def clients() -> list[Params]:
    return [pair(spec.rank, seed) for seed, spec in enumerate(SPECS)]


@pytest.fixture
def peft_model(clients: list[Params]) -> PeftModel:
    """Every client's adapter in one peft model, named c0, c1, c2."""
    plain = nn.Sequential()
    plain.add_module("m", nn.Linear(INTO, OUT, bias=False))
    model: Any = None
    for index, (params, spec) in enumerate(zip(clients, SPECS, strict=True)):
        config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=["m"])
        name = f"c{index}"
        if model is None:
            model = get_peft_model(plain, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.m
        layer.lora_A[name].weight.data = params["m.lora_A"].clone()
        layer.lora_B[name].weight.data = params["m.lora_B"].clone()
    return model


def weighted(model: PeftModel, kind: str, names: list[str], weights: list[float], **kw: Any) -> Any:
    model.add_weighted_adapter(names, weights, "mean", combination_type=kind, **kw)
    return model.base_model.model.m.get_delta_weight("mean").detach().double()


def baked(clients: list[Params], weights: list[float], specs: list[LoraSpec]) -> list[Params]:
    return [factors.bake(c, p * s.scaling) for c, p, s in zip(clients, weights, specs, strict=True)]


def test_roles_are_told_by_name() -> None:
    params = {
        **pair(2, 0, module="h.0.attn"),
        **pair(3, 0, module="a.lora_block"),
        "classifier.weight": torch.zeros(2, 5),
        "classifier.bias": torch.zeros(2),
    }
    assert factors.modules(params) == ["a.lora_block", "h.0.attn"]
    assert set(factors.select(params, factors.is_a)) == {"h.0.attn.lora_A", "a.lora_block.lora_A"}
    assert set(factors.select(params, factors.is_head)) == {"classifier.weight", "classifier.bias"}
    assert factors.select(params, factors.is_a, factors.is_b, factors.is_head) == params
    assert factors.size(params) == Size(2 * 12 + 3 * 12, 20 * 2 + 20 * 3, 12, rank=3, modules=2)
    assert (factors.rank(params), factors.rank({}), factors.full_rank({})) == (3, 0, 0)


def test_full_rank_is_the_smaller_side_of_the_largest_module() -> None:
    params = {**pair(2, 0, 5, 30, "flat"), **pair(2, 0, 9, 7, "square")}
    assert factors.full_rank(params) == 7


def test_stack_by_hand() -> None:
    one = {"m.lora_A": torch.tensor([[1.0, 2.0]]), "m.lora_B": torch.tensor([[3.0], [4.0]])}
    two = {"m.lora_A": torch.tensor([[5.0, 6.0]]), "m.lora_B": torch.tensor([[7.0], [8.0]])}
    stacked = factors.stack([one, two])
    assert stacked["m.lora_A"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert stacked["m.lora_B"].tolist() == [[3.0, 7.0], [4.0, 8.0]]
    assert factors.product(stacked, "m").tolist() == [[38.0, 48.0], [44.0, 56.0]]


def test_stack_refuses_other_modules() -> None:
    with pytest.raises(ValueError, match="different modules"):
        factors.stack([pair(2, 0), pair(2, 0, module="n")])


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0.1, 64.0), st.floats(0.01, 1.0)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 14),
    st.integers(1, 14),
)
def test_product_of_a_stack_is_the_sum_of_products(
    clients: list[tuple[int, float, float]], out: int, into: int
) -> None:
    specs = [LoraSpec(rank, alpha) for rank, alpha, _ in clients]
    total = sum(weight for *_, weight in clients)
    weights = [weight / total for *_, weight in clients]
    parts = [pair(rank, seed, out, into) for seed, (rank, *_) in enumerate(clients)]
    stacked = factors.stack(baked(parts, weights, specs))
    terms = [p * s.alpha / s.rank * dense(c) for p, s, c in zip(weights, specs, parts, strict=True)]
    scale = max(float(term.norm()) for term in terms)
    off = (factors.product(stacked, "m") - torch.stack(terms).sum(0)).norm()
    assert float(off) <= 2e-7 * scale * len(terms)
    assert stacked["m.lora_A"].dtype == torch.float32


def test_bake_puts_the_scaling_into_one_factor() -> None:
    params = {**pair(3, 0), "classifier.bias": torch.ones(2)}
    result = factors.bake(params, 2.5)
    assert torch.equal(result["m.lora_B"], params["m.lora_B"])
    assert torch.equal(result["m.lora_A"], params["m.lora_A"] * 2.5)
    assert torch.equal(result["classifier.bias"], torch.ones(2))
    assert gap(dense(result), 2.5 * dense(params)) < 1e-7


def test_a_stack_is_pefts_cat(clients: list[Params], peft_model: PeftModel) -> None:
    theirs = weighted(peft_model, "cat", ["c0", "c1", "c2"], P)
    ours = factors.product(factors.stack(baked(clients, P, SPECS)), "m")
    assert gap(ours, theirs) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_compacted_stack_is_pefts_svd(
    clients: list[Params], peft_model: PeftModel, rank: int
) -> None:
    theirs = weighted(peft_model, "svd", ["c0", "c1", "c2"], P, svd_rank=rank)
    compacted, _ = factors.compact(factors.stack(baked(clients, P, SPECS)), rank)
    assert gap(factors.product(compacted, "m"), theirs) < 1e-5


def test_a_stack_is_not_pefts_linear(clients: list[Params], peft_model: PeftModel) -> None:
    """For two equal clients with equal weights, `linear` gives twice their mean."""
    peft_model.add_adapter("twin", peft_model.peft_config["c0"])
    layer = peft_model.base_model.model.m
    layer.lora_A["twin"].weight.data = layer.lora_A["c0"].weight.data.clone()
    layer.lora_B["twin"].weight.data = layer.lora_B["c0"].weight.data.clone()
    theirs = weighted(peft_model, "linear", ["c0", "twin"], [0.5, 0.5])
    halves = baked([clients[0], clients[0]], [0.5, 0.5], [SPECS[0], SPECS[0]])
    assert gap(2.0 * factors.product(factors.stack(halves), "m"), theirs) < 1e-6


def test_scaling_is_pefts(peft_model: PeftModel) -> None:
    layer = peft_model.base_model.model.m
    for index, spec in enumerate(SPECS):
        assert spec.scaling == layer.scaling[f"c{index}"]
    peft_model.add_adapter(
        "stable", LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["m"])
    )
    assert LoraSpec(5, 3.0, rslora=True).scaling == pytest.approx(layer.scaling["stable"])


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 16), st.integers(1, 20))
def test_compact_is_the_truncated_dense_svd(rank: int, out: int, into: int, keep: int) -> None:
    params = pair(rank, out, out, into)
    compacted, error = factors.compact(params, keep)
    u, s, vt = torch.linalg.svd(dense(params), full_matrices=False)
    kept = min(keep, len(s))
    best = (u[:, :kept] * s[:kept]) @ vt[:kept]
    assert factors.rank(compacted) == min(keep, rank, out, into)
    # 1e-6 for the final rounding to fp32
    assert float((dense(compacted) - best).norm()) <= 1e-6 * float(s.norm())
    tail = float((s[kept:].square().sum() / s.square().sum()).sqrt())  # Eckart and Young
    assert error == pytest.approx(tail, abs=1e-7)
    found = float((dense(compacted) - dense(params)).norm() / s.norm())
    assert found == pytest.approx(tail, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(1, 16), st.integers(1, 16), st.integers(1, 20))
def test_svd_is_the_dense_one_with_no_more_vectors_than_asked_for(
    rank: int, out: int, into: int, keep: int
) -> None:
    params = pair(rank, out, out, into)
    ((name, u, s, vt),) = factors.svd(params, keep)
    k = min(rank, out, into)
    wanted = torch.linalg.svdvals(dense(params))[:k]
    assert (name, u.shape, vt.shape) == ("m", (out, min(keep, k)), (min(keep, k), into))
    assert torch.allclose(s, wanted, rtol=0, atol=1e-13 * (1 + float(wanted.sum())))
    eye = torch.eye(min(keep, k), dtype=torch.float64)
    assert torch.allclose(u.T @ u, eye, atol=1e-13)
    assert torch.allclose(vt @ vt.T, eye, atol=1e-13)
    scaled = u * s[: u.shape[1]]
    assert torch.allclose(dense(params) @ vt.T, scaled, atol=1e-12 * (1 + float(wanted.sum())))


def test_compact_loses_nothing_at_full_rank() -> None:
    params = {**pair(40, 0), **pair(40, 1, 6, 33, "n")}
    compacted, error = factors.compact(params)
    assert error == 0.0
    assert {n: tuple(t.shape) for n, t in compacted.items()} == {
        "m.lora_A": (12, 12),
        "m.lora_B": (20, 12),
        "n.lora_A": (6, 33),
        "n.lora_B": (6, 6),
    }
    for module in ("m", "n"):
        assert gap(dense(compacted, module), dense(params, module)) < 1e-6


def test_compact_reports_one_error_over_all_modules() -> None:
    """σ = (2, 1) and (6, 3) truncated to rank one: √(1 + 9) / √(4 + 1 + 36 + 9)."""
    one = {"m.lora_A": torch.eye(2), "m.lora_B": torch.diag(torch.tensor([2.0, 1.0]))}
    two = {"n.lora_A": torch.eye(2), "n.lora_B": torch.diag(torch.tensor([6.0, 3.0]))}
    compacted, error = factors.compact({**one, **two}, 1)
    assert error == pytest.approx((10 / 50) ** 0.5, rel=1e-12)
    assert factors.product(compacted, "m") == pytest.approx(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_compact_balances_the_factors() -> None:
    compacted, _ = factors.compact(factors.bake(pair(5, 0), 1e4), 3)
    a, b = compacted["m.lora_A"], compacted["m.lora_B"]
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


def test_compact_of_nothing_is_nothing() -> None:
    zero = {n: torch.zeros_like(t) for n, t in pair(5, 0).items()}
    compacted, error = factors.compact(zero, 2)
    assert (error, float(dense(compacted).abs().max())) == (0.0, 0.0)


def test_pad_keeps_products_and_makes_ranks_equal() -> None:
    params = {**pair(2, 0), **pair(5, 1, 9, 7, "n")}
    padded = factors.pad(params, 6)
    assert {tuple(t.shape) for t in padded.values()} == {(6, 12), (20, 6), (6, 7), (9, 6)}
    for module in ("m", "n"):
        assert torch.equal(dense(padded, module), dense(params, module))


@pytest.mark.parametrize("energy", [0.2, 0.75, 0.99])
def test_compact_by_energy_keeps_the_smallest_rank_that_is_enough(energy: float) -> None:
    """Of each module by itself; the errors join."""
    params = {**pair(9, 0), **pair(3, 1, 6, 33, "n")}
    compacted, error = factors.compact(params, energy=energy)
    lost = total = 0.0
    for module in ("m", "n"):
        square = torch.linalg.svdvals(dense(params, module)).square()
        shares = square.cumsum(0) / square.sum()
        rank = int((shares < energy).sum()) + 1
        assert compacted[f"{module}.lora_A"].shape[0] == rank
        lost, total = lost + float(square[rank:].sum()), total + float(square.sum())
    assert error == pytest.approx((lost / total) ** 0.5, abs=1e-7)
    assert error <= (1 - energy) ** 0.5


def test_compact_by_energy_goes_no_further_than_the_largest_rank() -> None:
    compacted, _ = factors.compact(pair(9, 0), 2, energy=0.999)
    assert factors.rank(compacted) == 2
    assert tree.digest(factors.compact(pair(9, 0), energy=1.0)[0]) == tree.digest(
        factors.compact(pair(9, 0))[0]
    )


def test_mean_is_numpys_weighted_average() -> None:
    parts = {name: pair(3, seed) for seed, name in enumerate("abc")}
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    found = factors.mean(parts, weights)
    for name, tensor in found.items():
        stacked = np.stack([parts[c][name].double().numpy() for c in weights])
        wanted = np.average(stacked, axis=0, weights=list(weights.values()))
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-14)
        assert tensor.dtype == torch.float64
    assert factors.mean(parts, weights, factors.is_a).keys() == {"m.lora_A"}


def test_distance_is_that_of_the_dense_products() -> None:
    one, other = pair(3, 0), pair(5, 1)
    wanted = gap(dense(one), dense(other))
    assert factors.distance(one, other) == pytest.approx(wanted, rel=1e-12)
    assert factors.distance(one, one) < 64 * torch.finfo(torch.float64).eps  # sums of 6 columns
