import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corolla import seeds
from corolla.aggregation.robust import (
    Robust,
    by_score,
    refusal,
    space_of,
    squared_distances,
    squared_norms,
)
from corolla.aggregation.stacks import Stack
from corolla.aggregation.sums import ByGroup, SeedSums, Sum, WeightedMean
from corolla.config.asked import compared_in
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.errors import ConfigError
from corolla.interfaces import Aggregator, Traits
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import Params, Payload, RobustRule, Space

RULES: tuple[RobustRule, ...] = ("median", "trimmed_mean", "norm_clip", "krum", "multi_krum")
OUT, IN, RANK = 24, 20, 4
HONEST, HOSTILE = 8, 2


def stacking() -> ByGroup:
    return ByGroup({"factors": Stack(), "head": WeightedMean()})


def fold(aggregator: Aggregator, updates: Sequence[Payload], weight: float = 1.0) -> Payload:
    for update in updates:
        aggregator.add(update, weight)
    return aggregator.finalise()


def numbers(*values: float) -> Payload:
    return {"adapter": {"x": torch.tensor(values)}}


def vector(payload: Payload) -> Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(payload["adapter"].items())])


def product(params: Params) -> Tensor:
    return params["m.lora_B"].double() @ params["m.lora_A"].double()


# -- The attack table: ten clients, two of them hostile, updates of rank 4 that agree in part. ----

Attack = Callable[[Params, Sequence[Params]], Params]


def client(number: int, rank: int = RANK, seed: int = 0) -> Params:
    """What all want, and half as much of its own."""
    common, own = seeds.generator(seed, "common"), seeds.generator(seed, "own", number)
    shapes = {"m.lora_A": (rank, IN), "m.lora_B": (OUT, rank)}
    return {
        name: torch.randn(shape, generator=common) + 0.5 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }


def scaled(a: float, b: float) -> Attack:
    return lambda own, honest: {"m.lora_A": a * own["m.lora_A"], "m.lora_B": b * own["m.lora_B"]}


def rotated(own: Params, honest: Sequence[Params]) -> Params:
    """Another gauge of the same product: (Q A, B Qᵀ)."""
    q, _ = torch.linalg.qr(torch.randn(RANK, RANK, generator=seeds.generator(0, "rotation")))
    return {"m.lora_A": q @ own["m.lora_A"], "m.lora_B": own["m.lora_B"] @ q.T}


def alie(z: float) -> Attack:
    """Baruch et al.: z standard deviations from the honest mean, in every coordinate."""

    def attack(own: Params, honest: Sequence[Params]) -> Params:
        stacks = {name: torch.stack([h[name] for h in honest]) for name in own}
        return {name: x.mean(0) - z * x.std(0) for name, x in stacks.items()}

    return attack


ATTACKS: dict[str, Attack] = {
    "none": scaled(1, 1),
    "sign-flip x5": scaled(1, -5),
    "flip all x5": scaled(-5, -5),
    "negate both": scaled(-1, -1),
    "ALIE z=1": alie(1),
    "ALIE z=2": alie(2),
    "B x100": scaled(1, 100),
    "gauge A*100 B/100": scaled(100, 0.01),
    "gauge rotation": rotated,
}


def cohort(attack: str, group: str) -> tuple[list[Payload], Params]:
    """The updates of all, and those of the honest in the mean (averaged factors, or stacked)."""
    clients = [client(number) for number in range(HONEST + HOSTILE)]
    honest, rest = clients[:HONEST], clients[HONEST:]
    sent = [*honest, *(ATTACKS[attack](own, honest) for own in rest)]
    extra: Payload = {"head": {}} if group == "factors" else {}
    wrap: list[Payload] = [{group: params, **extra} for params in sent]
    good = fold(stacking() if extra else WeightedMean(), wrap[:HONEST])[group]
    return wrap, good


def factor_error(attack: str, aggregator: Aggregator) -> float:
    """Of averaged factors, relative to the honest mean."""
    updates, good = cohort(attack, "adapter")
    off = vector(fold(aggregator, updates)) - vector({"adapter": good})
    return float(off.norm() / vector({"adapter": good}).norm())


def product_error(attack: str, aggregator: Aggregator) -> float:
    """Of the sum of products, relative to that of the honest."""
    updates, good = cohort(attack, "factors")
    off = product(fold(aggregator, updates)["factors"]) - product(good)
    return float(off.norm() / product(good).norm())


# Attack → how far off the mean is at least, and each rule at most.
FACTORS: dict[str, tuple[float, dict[RobustRule, float]]] = {
    "none": (0.0, {"median": 0.2, "trimmed_mean": 0.15, "norm_clip": 0.1, "multi_krum": 0.15}),
    "sign-flip x5": (0.8, {"median": 0.2, "trimmed_mean": 0.2, "norm_clip": 0.45}),
    "flip all x5": (1.2, {"median": 0.22, "trimmed_mean": 0.22, "norm_clip": 0.45}),
    "negate both": (0.4, {"median": 0.22, "trimmed_mean": 0.22, "norm_clip": 0.45}),
    "ALIE z=1": (0.0, {"median": 0.25, "trimmed_mean": 0.2, "norm_clip": 0.15, "multi_krum": 0.2}),
    "ALIE z=2": (0.2, {"median": 0.25, "trimmed_mean": 0.25, "norm_clip": 0.2}),
    "B x100": (14.0, {"median": 0.2, "trimmed_mean": 0.2, "norm_clip": 0.2}),
    "gauge A*100 B/100": (14.0, {"median": 0.2, "trimmed_mean": 0.2, "norm_clip": 0.2}),
    "gauge rotation": (0.3, {"median": 0.2, "trimmed_mean": 0.2, "norm_clip": 0.36}),
}
PRODUCTS: dict[str, tuple[float, dict[RobustRule, float]]] = {
    "none": (0.0, {"norm_clip": 0.15, "multi_krum": 0.2}),
    "sign-flip x5": (1.3, {"norm_clip": 0.45}),
    "flip all x5": (5.0, {"norm_clip": 0.15}),
    "negate both": (0.0, {"norm_clip": 0.15, "multi_krum": 0.2}),
    "ALIE z=1": (0.0, {"norm_clip": 0.2, "multi_krum": 0.3}),
    "ALIE z=2": (0.5, {"norm_clip": 0.3}),
    "B x100": (20.0, {"norm_clip": 0.15}),
    "gauge A*100 B/100": (0.0, {"norm_clip": 0.15, "multi_krum": 0.2}),
    "gauge rotation": (0.0, {"norm_clip": 0.15, "multi_krum": 0.2}),
}
"""multi_krum leaves out both hostile updates where it is not named: no error at all."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_rules_bound_attacks_on_averaged_factors(attack: str) -> None:
    far, bounds = FACTORS[attack]
    assert factor_error(attack, WeightedMean()) >= far
    for rule, bound in {"multi_krum": 1e-7, **bounds}.items():
        assert factor_error(attack, Robust(rule, WeightedMean)) <= bound, rule


@pytest.mark.parametrize("attack", ATTACKS)
def test_rules_bound_attacks_on_stacked_products(attack: str) -> None:
    far, bounds = PRODUCTS[attack]
    assert product_error(attack, stacking()) >= far
    for rule, bound in {"multi_krum": 1e-6, **bounds}.items():
        assert product_error(attack, Robust(rule, stacking, "products")) <= bound, rule


@pytest.mark.parametrize("attack", ["negate both", "gauge A*100 B/100", "gauge rotation"])
def test_krum_on_products_is_blind_to_hostile_factors_that_are_averaged(attack: str) -> None:
    """Why `refusal` has no products for strategies that average factors."""
    updates, _ = cohort(attack, "factors")
    usual, _ = cohort("none", "factors")
    chosen, same = (
        by_score(sent, squared_distances(sent, "products"), HOSTILE)[:HONEST]
        for sent in (updates, usual)
    )
    assert sorted(chosen) == sorted(same)  # as if nobody was hostile
    assert max(chosen) >= HONEST  # and a hostile update is among them
    mean = fold(WeightedMean(), [updates[i] for i in chosen])["factors"]
    good = fold(WeightedMean(), [usual[i] for i in range(HONEST)])["factors"]
    off = vector({"adapter": mean}) - vector({"adapter": good})
    assert float(off.norm() / vector({"adapter": good}).norm()) > 0.2
    assert factor_error(attack, Robust("multi_krum", WeightedMean)) < 1e-7


def product_in_order(left: Tensor, right: Tensor) -> Tensor:
    """Left · right in float32, one term after another: how each rounds is no matter of kernels."""
    total = torch.zeros(len(left), right.shape[1])
    for k in range(len(right)):
        total += left[:, k : k + 1] * right[k : k + 1]
    return total


@pytest.mark.parametrize("rule", ["norm_clip", "krum", "multi_krum"])
def test_huge_factors_that_cancel_do_not_pass_for_a_short_product(rule: RobustRule) -> None:
    """Their product is 0, but not for a client that multiplies them in float32.

    Each value of B · A · x is 2^40 + 2^16 - 2^40 - 2^16, times a weight, where x begins with ones.
    Half a step of float32 at 2^40 is 2^16: the first sum rounds, and what that adds or loses is
    left at the end. fp64 holds all these sums, and those of squares, in any order.
    """
    updates, good = cohort("none", "factors")
    a = torch.zeros(2, IN)
    a[0, 0], a[1, 1] = 2**20, 2**-4
    huge = {"m.lora_B": torch.full((OUT, 4), 2.0**20), "m.lora_A": torch.cat([a, -a])}
    sent = [*updates[:HONEST], *[{"factors": huge, "head": {}}] * HOSTILE]
    x = torch.randn(IN, 1, generator=seeds.generator(0, "x"))
    x[:2] = 1
    wanted = product(good) @ x.double()

    def error(aggregator: Aggregator) -> float:
        result = fold(aggregator, sent)["factors"]
        found = product_in_order(result["m.lora_B"], product_in_order(result["m.lora_A"], x))
        return float((found - wanted).norm() / wanted.norm())

    assert squared_norms(sent, "products")[HONEST:].tolist() == [0.0] * HOSTILE
    assert error(stacking()) > 20
    assert error(Robust(rule, stacking, "products")) < 1.1  # krum may take their 0


# -- Distances. -----------------------------------------------------------------------------------


def mixed_updates(ranks: Sequence[int], seed: int = 0) -> list[Payload]:
    """Two modules and a head; the ranks of clients differ."""
    found: list[Payload] = []
    for number, rank in enumerate(ranks):
        generator = seeds.generator(seed, "mixed", number)
        shapes = {
            "a.lora_A": (rank, 9), "a.lora_B": (6, rank), "b.lora_A": (rank, 5),
            "b.lora_B": (7, rank),
        }  # fmt: skip
        params = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        found.append({"factors": params, "head": {"bias": torch.randn(3, generator=generator)}})
    return found


def dense(update: Payload) -> Tensor:
    parts = [factors.product(update["factors"], module).flatten() for module in ("a", "b")]
    return torch.cat([*parts, update["head"]["bias"].double()])


@settings(max_examples=25)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_products_are_measured_as_if_they_had_been_formed(ranks: list[int], seed: int) -> None:
    updates = mixed_updates(ranks, seed)
    rows = [dense(update) for update in updates]
    for row, found in zip(rows, squared_norms(updates, "products"), strict=True):
        assert float(found) == pytest.approx(float(row.square().sum()), rel=1e-12)
    distances = squared_distances(updates, "products")
    for (i, x), (j, y) in itertools.product(enumerate(rows), repeat=2):
        assert float(distances[i, j]) == pytest.approx(float((x - y).square().sum()), rel=1e-12)


def test_values_are_measured_over_all_groups_jointly() -> None:
    updates = mixed_updates([2, 2, 2])
    rows = [torch.cat([t.double().flatten() for g in u.values() for t in g.values()])
            for u in updates]  # fmt: skip
    wanted = torch.tensor([[float((x - y).square().sum()) for y in rows] for x in rows])
    assert torch.allclose(squared_distances(updates, "tensors"), wanted.double(), rtol=1e-6)
    norms = torch.tensor([float(x.square().sum()) for x in rows], dtype=torch.float64)
    assert torch.allclose(squared_norms(updates, "tensors"), norms, rtol=1e-14)


def test_updates_that_agree_to_six_digits_keep_their_distances() -> None:
    """|x| = 100 and d² = 2e-6: float32 sums of squares have nothing left of it."""
    n = 10_000
    generator = seeds.generator(0, "late")
    base = torch.randn(n, generator=generator)
    sent = [base + 1e-5 * torch.randn(n, generator=generator) for _ in range(4)]
    exact = [
        [math.fsum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) for b in sent]
        for a in sent
    ]
    found = squared_distances([{"adapter": {"x": x}} for x in sent], "tensors")
    assert torch.allclose(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    assert 1.5e-6 < exact[0][1] < 2.5e-6
    x, y = sent[:2]
    single = float((x @ x) + (y @ y) - 2 * (x @ y))  # in float32
    assert abs(single - exact[0][1]) > 0.9 * exact[0][1]


def test_products_that_agree_to_five_digits_keep_their_distances() -> None:
    b, a = torch.eye(4)[:, :2] * 64, torch.eye(3)[:2] * 1.0
    near = a + 2.0**-16 * torch.eye(3)[[1, 2]]
    updates = [{"factors": {"m.lora_A": x, "m.lora_B": b}} for x in (a, near)]
    exact = 2 * (64 * 2.0**-16) ** 2  # 1.9e-6, of norms of 90
    assert float(squared_distances(updates, "products")[0, 1]) == pytest.approx(exact, rel=1e-5)


def test_updates_of_different_shapes_are_not_compared() -> None:
    updates = mixed_updates([2, 2, 3, 2, 2])
    for rule in ("krum", "multi_krum"):
        with pytest.raises(ValueError, match="they differ in shape"):
            fold(Robust(rule, stacking, "tensors"), updates)
        fold(Robust(rule, stacking, "products"), updates)


def test_sums_count_everyone_whose_update_is_replaced() -> None:
    """A sum over clients, as of SCAFFOLD's control variates, keeps its size."""
    result = fold(Robust("median", Sum), [numbers(x) for x in (1.0, 2.0, 50.0)])
    assert result["adapter"]["x"].tolist() == [6.0]


def test_krum_scores_by_hand() -> None:
    """n = 5, f = 1: the sum of the two smallest squares."""
    updates = [numbers(x) for x in (0.0, 2.0, 5.0, 6.0, 50.0)]
    distances = squared_distances(updates, "tensors")
    # 0: 4 + 25;  2: 4 + 9;  5: 1 + 9;  6: 1 + 16;  50: 44² + 45²
    assert by_score(updates, distances, 1) == [2, 1, 3, 0, 4]
    result = fold(Robust("krum", WeightedMean, byzantine=1), updates)
    assert result["adapter"]["x"].tolist() == [5.0]
    result = fold(Robust("multi_krum", WeightedMean, byzantine=1), updates)
    assert result["adapter"]["x"].tolist() == [3.25]  # the mean of 0 2 5 6


def test_measures_of_products_are_never_negative() -> None:
    """Rounding of what is 0 would end in square roots of less."""
    for seed in range(10):
        (one,) = mixed_updates([3], seed)
        generator = seeds.generator(seed, "gauge")
        q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())
        exact = {name: tensor.double() for name, tensor in one["factors"].items()}
        turned = {n: q @ t if factors.is_a(n) else t @ q.T for n, t in exact.items()}
        none = factors.stack([turned, factors.bake(exact, -1.0)])
        updates = [one, {**one, "factors": turned}, {"factors": none, "head": {}}]
        assert 0 <= float(squared_norms(updates[2:], "products")) < 1e-9
        assert 0 <= float(squared_distances(updates[:2], "products")[0, 1]) < 1e-9


def test_equal_scores_do_not_depend_on_the_order_of_clients() -> None:
    updates = [numbers(x) for x in (-1.0, 1.0, -2.0, 2.0, -3.0, 3.0)]  # a mirror image
    found = {
        fold(Robust("krum", WeightedMean, byzantine=1), list(order))["adapter"]["x"].item()
        for order in itertools.permutations(updates)
    }
    assert len(found) == 1


# -- Coordinates. ---------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1,
                  max_size=9)
)  # fmt: skip
def test_the_median_is_that_of_numpy(rows: list[list[float]]) -> None:
    result = fold(Robust("median", WeightedMean), [numbers(*row) for row in rows])
    wanted = np.median(np.array(rows, dtype=np.float64), axis=0).astype(np.float32)
    assert result["adapter"]["x"].numpy().tolist() == wanted.tolist()


def test_a_trimmed_mean_by_hand() -> None:
    updates = [numbers(x, -x) for x in (7.0, 1.0, 1000.0, 4.0, -1000.0)]
    result = fold(Robust("trimmed_mean", WeightedMean, byzantine=1), updates)
    assert result["adapter"]["x"].tolist() == [4.0, -4.0]  # (1 + 4 + 7) / 3
    result = fold(Robust("trimmed_mean", WeightedMean, byzantine=2), updates)
    assert result["adapter"]["x"].tolist() == [4.0, -4.0]  # the median


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=12), data=st.data())
def test_a_trimmed_mean_is_that_of_the_sorted_values(
    values: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, (len(values) - 1) // 2))
    result = fold(Robust("trimmed_mean", WeightedMean, byzantine=cut), [numbers(v) for v in values])
    wanted = np.mean(np.sort(np.array(values, dtype=np.float64))[cut : len(values) - cut])
    assert result["adapter"]["x"].item() == pytest.approx(float(wanted), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_coordinates_keep_their_type_and_ignore_examples(rule: RobustRule) -> None:
    aggregator = Robust(rule, WeightedMean, byzantine=1)
    for value, weight in ((1.0, 1), (2.0, 1e6), (9.0, 1)):
        x = torch.tensor([value], dtype=torch.bfloat16)
        aggregator.add({"g": {"x": x}, "empty": {}}, weight)
    result = aggregator.finalise()
    assert result["empty"] == {}
    assert result["g"]["x"].dtype == torch.bfloat16
    assert result["g"]["x"].item() == 2.0


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
def test_krum_keeps_the_weights_of_whom_it_selects(rule: RobustRule) -> None:
    aggregator = Robust(rule, WeightedMean, byzantine=1)
    for value, weight in ((0.0, 1), (1.0, 2), (3.0, 3), (6.0, 4), (50.0, 1000)):
        aggregator.add(numbers(value), weight)
    wanted = 1.0 if rule == "krum" else (1 * 2 + 3 * 3 + 6 * 4) / (1 + 2 + 3 + 4)
    assert aggregator.finalise()["adapter"]["x"].item() == pytest.approx(wanted)
    assert aggregator.metrics == {"robust_selected": 1 if rule == "krum" else 4}


# -- Norms. ---------------------------------------------------------------------------------------


def test_norms_are_clipped_to_their_median() -> None:
    updates = [numbers(3.0, 4.0), numbers(0.0, 1.0), numbers(600.0, 800.0)]
    aggregator = Robust("norm_clip", WeightedMean)
    result = fold(aggregator, updates)
    assert result["adapter"]["x"].tolist() == pytest.approx([(3 + 0 + 3) / 3, (4 + 1 + 4) / 3])
    assert aggregator.metrics == {"robust_norm": 5.0, "robust_clipped": 1}


def test_clipped_updates_keep_their_weights() -> None:
    aggregator = Robust("norm_clip", WeightedMean)
    for value, weight in ((1.0, 1), (2.0, 2), (10.0, 5)):
        aggregator.add(numbers(value), weight)
    assert aggregator.finalise()["adapter"]["x"].item() == pytest.approx((1 + 4 + 10) / 8)


def test_the_medians_of_earlier_rounds_bound_the_norms_of_this_one() -> None:
    """Also where the hostile are most of a small cohort."""
    aggregator = Robust("norm_clip", WeightedMean, history=(1.0, 1.0, 1.5, 2.0))
    result = fold(aggregator, [numbers(1.0), numbers(-100.0), numbers(-100.0)])
    # median of 1 1 1 1.5 2 100 100
    assert result["adapter"]["x"].item() == pytest.approx((1.0 - 1.5 - 1.5) / 3)
    assert aggregator.metrics == {"robust_norm": 100.0, "robust_clipped": 2}  # of this round alone


def test_updates_of_nothing_are_not_divided_by_their_norm() -> None:
    result = fold(Robust("norm_clip", WeightedMean), [numbers(0.0), numbers(0.0), numbers(7.0)])
    assert result["adapter"]["x"].item() == 0.0


def test_a_long_product_is_shortened_by_its_norm_once() -> None:
    """With its head; A and B both times c would make c² of it."""
    updates = [*mixed_updates([2, 3, 1]), *mixed_updates([4])]
    updates[3] = {
        "factors": {n: 10 * t for n, t in updates[3]["factors"].items()},
        "head": {n: 100 * t for n, t in updates[3]["head"].items()},
    }
    norms = sorted(float(dense(u).norm()) for u in updates)
    bound = (norms[1] + norms[2]) / 2
    wanted = sum(
        dense(u) * min(1.0, bound / float(dense(u).norm())) for u in updates
    ) / len(updates)  # fmt: skip
    result = fold(Robust("norm_clip", stacking, "products"), updates)
    assert float((dense(result) - wanted).norm()) < 1e-6 * float(torch.as_tensor(wanted).norm())
    assert result["factors"]["a.lora_A"].dtype == torch.float32


# -- Scalars along seeded directions. -------------------------------------------------------------


def measured(values: Sequence[float], step: float = -0.5, **named: Tensor) -> Payload:
    return {"scalars": {"scalars": torch.tensor(values), "step": torch.tensor(step), **named}}


def on(*directions: int) -> Tensor:
    return torch.tensor(directions, dtype=torch.int32)


def seed_sums() -> SeedSums:
    return SeedSums(8)


def test_scalars_are_clipped_and_what_they_belong_to_is_left() -> None:
    updates = [
        measured([3.0, 4.0], directions=on(0, 1)),
        measured([1.0, 0.0], directions=on(2, 3)),
        measured([60.0, 80.0], directions=on(4, 5)),
    ]
    found = fold(Robust("norm_clip", seed_sums), updates)["scalars"]["scalars"] * 3
    assert found.tolist() == pytest.approx([-1.5, -2.0, -0.5, 0.0, -1.5, -2.0, 0.0, 0.0])


def test_steps_and_repeats_count_in_the_length_of_a_move() -> None:
    """Ten scalars of 1 along one direction move by 10, along ten directions by √10."""
    one, far = measured([1.0] * 10, directions=on(*[3] * 10)), measured([4.0], -5.0, seed=on(0)[0])
    ten = measured([1.0] * 10, directions=on(*range(10)))
    norms = [float(squared_norms([u], "tensors").sqrt()) for u in (one, ten, far)]
    assert norms == pytest.approx([5.0, 0.5 * math.sqrt(10), 20.0])


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_scalars_along_the_same_directions_are_compared(rule: RobustRule) -> None:
    where = on(2, 0)
    updates = [measured([x, -x], directions=where) for x in (1.0, 1.0, 1.0, 1.0, 500.0)]
    found = fold(Robust(rule, seed_sums), updates)["scalars"]["scalars"]
    assert found.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_scalars_along_different_directions_are_not_compared(rule: RobustRule) -> None:
    updates = [measured([1.0, 2.0], directions=on(0, k)) for k in range(5)]
    with pytest.raises(ValueError, match="cannot be compared: they differ in 'directions'"):
        fold(Robust(rule, seed_sums), updates)
    updates = [measured([1.0, 2.0], seed=torch.tensor(k)) for k in range(5)]
    with pytest.raises(ValueError, match="cannot be compared: they differ in 'seed'"):
        fold(Robust(rule, seed_sums), updates)


def test_updates_of_different_groups_are_refused() -> None:
    updates = [numbers(1.0), measured([1.0], directions=on(0))]
    with pytest.raises(ValueError, match="they differ in their groups"):
        fold(Robust("norm_clip", WeightedMean), updates)


# -- What all rules share. ------------------------------------------------------------------------

CASES: list[tuple[RobustRule, Space]] = [
    *((rule, "tensors") for rule in RULES),
    *((rule, "products") for rule in ("norm_clip", "krum", "multi_krum")),
]


def made(rule: RobustRule, space: Space) -> Robust:
    return Robust(rule, stacking if space == "products" else WeightedMean, space, byzantine=1)


@settings(max_examples=40)
@given(case=st.sampled_from(CASES), data=st.data())
def test_neither_order_nor_merging_changes_the_result(
    case: tuple[RobustRule, Space], data: st.DataObject
) -> None:
    updates = list(enumerate(mixed_updates([2] * 6)))
    flat = made(*case)
    for number, update in updates:
        flat.add(update, number + 1.0)
    forest = []
    for number, update in data.draw(st.permutations(updates)):
        forest.append(made(*case))
        forest[-1].add(update, number + 1.0)
    while len(forest) > 1:
        at = data.draw(st.integers(0, len(forest) - 2))
        forest[at].merge(forest.pop(at + 1))
    wanted, found = dense(flat.finalise()), dense(forest[0].finalise())
    assert float((found - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert forest[0].metrics == pytest.approx(flat.metrics)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_that_was_added_changes_and_finalise_may_be_called_twice(
    case: tuple[RobustRule, Space],
) -> None:
    updates, same = mixed_updates([2] * 6), mixed_updates([2] * 6)
    aggregator = made(*case)
    first = fold(aggregator, updates)
    again = aggregator.finalise()
    for result in (first, again):
        assert torch.equal(dense(result), dense(first))
    for params in first.values():
        for tensor in params.values():
            tensor.zero_()
    for one, other in zip(updates, same, strict=True):
        assert torch.equal(dense(one), dense(other))
    assert not aggregator.linear


@pytest.mark.parametrize(
    ("rule", "byzantine", "enough"),
    [("krum", 1, 5), ("multi_krum", 2, 7), ("trimmed_mean", 2, 5), ("trimmed_mean", None, 3),
     ("krum", None, 5), ("median", None, 1), ("norm_clip", None, 1)],
)  # fmt: skip
def test_too_few_updates_are_said_in_one_line(
    rule: RobustRule, byzantine: int | None, enough: int
) -> None:
    updates = [numbers(float(i)) for i in range(enough)]
    fold(Robust(rule, WeightedMean, byzantine=byzantine), updates)
    found = (
        f"{rule} needs {enough} updates where {byzantine or 1} may be hostile, found {enough - 1}"
    )
    with pytest.raises(ValueError, match=f"^{found}$"):
        fold(Robust(rule, WeightedMean, byzantine=byzantine), updates[1:])


@pytest.mark.parametrize(("n", "cut"), [(4, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_a_fifth_of_the_updates_may_be_hostile_unless_told(n: int, cut: int) -> None:
    updates = [numbers(2.0**i) for i in range(n)]
    wanted = sum(2.0**i for i in range(cut, n - cut)) / (n - 2 * cut)
    result = fold(Robust("trimmed_mean", WeightedMean), updates)
    assert result["adapter"]["x"].item() == pytest.approx(wanted)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_products_have_no_coordinates(rule: RobustRule) -> None:
    with pytest.raises(ValueError, match=f"{rule} is of coordinates"):
        Robust(rule, stacking, "products")


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown rule 'mean': choose from median, "):
        Robust("mean", WeightedMean)  # type: ignore[arg-type]


FORMS: dict[str, Payload] = {
    "averages": numbers(1.0),
    "stacks": cohort("none", "factors")[0][0],
    "own seeds": measured([1.0], seed=torch.tensor(1)),
    "own directions": measured([1.0], directions=on(1)),
    "shared directions": {"projections": {"scalars": torch.zeros(4)}},
}
FITTING: dict[str, tuple[RobustRule, ...]] = {
    "averages": RULES,
    "stacks": ("norm_clip", "krum", "multi_krum"),
    "own seeds": ("norm_clip",),
    "own directions": ("norm_clip",),
    "shared directions": RULES,
}


TRAITS = {form: Traits(updates="factors" if form == "stacks" else "differences") for form in FORMS}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_rules_fit_or_say_why_not(form: str, rule: RobustRule) -> None:
    space = space_of(TRAITS[form])
    assert space == ("products" if form == "stacks" else "tensors")
    reason = refusal(rule, space, TRAITS[form], [FORMS[form]])
    assert (reason is None) == (rule in FITTING[form])
    assert "\n" not in (reason or "")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("updates", ["differences", "values", "scalars"])
def test_averages_are_never_checked_by_products(updates: Any, rule: RobustRule) -> None:
    """Whatever the names of their groups."""
    for like in FORMS.values():
        assert refusal(rule, "products", Traits(updates=updates), [like]) is not None


def test_stacks_are_checked_by_their_products_of_any_ranks() -> None:
    one, two = mixed_updates([2, 3])
    stacks = TRAITS["stacks"]
    for rule in FITTING["stacks"]:
        assert refusal(rule, "products", stacks, [one, two]) is None
        reason = refusal(rule, "tensors", stacks, [one])
        assert reason is not None and "random basis" in reason


def test_coordinates_are_not_of_strategies_that_need_single_updates() -> None:
    for rule in RULES:
        reason = refusal(rule, "tensors", Traits(individual=True), [FORMS["averages"]])
        assert (reason is None) == (rule not in ("median", "trimmed_mean"))


def test_values_are_no_changes_to_be_shortened() -> None:
    for rule in RULES:
        reason = refusal(rule, "tensors", Traits(updates="values"), [FORMS["averages"]])
        assert (reason is None) == (rule != "norm_clip")


def test_updates_of_two_kinds_cannot_be_compared() -> None:
    for rule in RULES:
        reason = refusal(rule, "tensors", Traits(), [FORMS["averages"], FORMS["own seeds"]])
        assert reason is not None and "different kinds" in reason


# -- In a config, and with every strategy. --------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"robust": "mean"}, "robust: expected one of none, median"),
        ({"byzantine": 2}, "byzantine is for robust=trimmed_mean or krum or multi_krum, found "),
        ({"robust": "median", "byzantine": 2}, "byzantine is for robust=trimmed_mean "),
        ({"robust": "krum", "byzantine": 0}, "byzantine: expected a whole number from 1"),
        ({"robust": "median", "strategy": "flora"}, "robust=median does not fit strategy flora: "),
        ({"robust": "krum", "robust_space": "products"}, "does not fit strategy fedavg: "),
        ({"robust": "krum", "strategy": "fedkseed"}, "directions: use norm_clip"),
        ({"robust": "krum", "cohort": 4}, "needs 5 clients a round where 1 may be hostile, "),
        ({"robust": "trimmed_mean", "byzantine": 4}, "robust=trimmed_mean needs 9 clients "),
        ({"robust": "multi_krum", "clients": 4}, "robust=multi_krum needs 5 clients "),
    ],
)
def test_configs_say_what_does_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def lookalike(like: Payload, number: int) -> Payload:
    """Random numbers where there are coordinates."""
    generator = seeds.generator(number, "lookalike")
    return {
        group: {
            n: torch.randn(t.shape, generator=generator).to(t.dtype) if t.dim() and
            t.is_floating_point() else t
            for n, t in params.items()
        }
        for group, params in like.items()
    }  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", registry.STRATEGIES)
def test_a_rule_and_a_strategy_work_together_or_are_refused(name: str, rule: RobustRule) -> None:
    traits = registry.traits(registry.find(name))
    values: dict[str, Any] = {"strategy": name, "optimizer": traits.optimizers[0], "robust": rule}
    if name == "mixed":
        values["classes"] = {t: {"trainer": t} for t in ("first_order", "zeroth_order")}
    try:
        checked = validate(values)
    except ConfigError as error:
        assert f"robust={rule} does not fit strategy {name}: " in str(error)
        assert rule != "norm_clip" or name in ("fisher", "mixed", "hetlora", "scaffold")
        return
    strategy = build_strategy(checked)
    start = {"m.lora_A": torch.randn(8, IN, generator=seeds.generator(0, "start")),
             "m.lora_B": torch.zeros(OUT, 8), "head": torch.zeros(3)}  # fmt: skip
    state = strategy.init(start, 0)
    size = replace(factors.size(start), trainer=strategy.trainers[0], scalars=6, seed=1, step=-1.0)
    likes = [lookalike(strategy.update_like(start, size), number) for number in range(7)]
    defence = Robust(rule, strategy.aggregator, compared_in(checked, strategy))
    after, _ = strategy.apply(state, fold(defence, likes))
    assert after.keys() >= state.keys() - {"key"}
