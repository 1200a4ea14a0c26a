import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla import seeds
from corolla.aggregation.stacks import MeanAndResidual, Stack
from corolla.aggregation.sums import ByGroup, SeedSums, Sum, WeightedMean
from corolla.directions import signs
from corolla.interfaces import Aggregator
from corolla.types import Payload

Make = Callable[[], Aggregator]


def by_group() -> ByGroup:
    return ByGroup({"factors": Stack(), "head": WeightedMean()})


def seed_sums() -> SeedSums:
    return SeedSums(16)


MAKES: list[Make] = [WeightedMean, Stack, by_group, seed_sums]


def update(seed: int, rank: int = 2, head: bool = True) -> Payload:
    generator = seeds.generator(seed, "update")
    return {
        "factors": {
            "m.lora_A": torch.randn(rank, 5, generator=generator),
            "m.lora_B": torch.randn(7, rank, generator=generator),
        },
        "head": {"bias": torch.randn(3, generator=generator)} if head else {},
        "scalars": {
            "scalars": torch.randn(5, generator=generator),
            "step": torch.tensor(-0.125 * (1 + seed)),
            "directions": torch.randperm(16, generator=generator)[:5].int(),
        },
    }


def usable(make: Make, payload: Payload) -> Payload:
    groups = {Stack: ["factors"], seed_sums: ["scalars"]}.get(make, ["factors", "head"])
    return {group: payload[group] for group in groups}


def folded(make: Make, updates: Sequence[tuple[Payload, float]]) -> Aggregator:
    aggregator = make()
    for payload, weight in updates:
        aggregator.add(usable(make, payload), weight)
    return aggregator


def dense(payload: Payload, make: Make) -> torch.Tensor:
    """What an aggregate stands for: a stack is known by its product only."""
    if make is seed_sums:
        return payload["scalars"]["scalars"]
    group = payload["factors"]
    if make is WeightedMean:
        parts = [t.double().flatten() for _, t in sorted(group.items())]
    else:
        parts = [(group["m.lora_B"].double() @ group["m.lora_A"].double()).flatten()]
    parts += [t.double().flatten() for t in payload.get("head", {}).values()]
    return torch.cat(parts)


def test_weighted_mean_by_hand() -> None:
    mean = WeightedMean()
    mean.add({"g": {"x": torch.tensor([1.0, 10.0])}, "h": {"y": torch.tensor(2.0)}}, 1)
    mean.add({"g": {"x": torch.tensor([5.0, -10.0])}, "h": {"y": torch.tensor(6.0)}}, 3)
    result = mean.finalise()
    assert result["g"]["x"].tolist() == [4.0, -5.0]  # (1 + 3·5) / 4, (10 - 3·10) / 4
    assert result["h"]["y"].item() == 5.0  # (2 + 3·6) / 4


def test_stack_by_hand() -> None:
    stack = Stack()
    for a, b, weight in ((1.0, 2.0, 1), (3.0, 4.0, 3)):
        stack.add({"g": {"m.lora_A": torch.tensor([[a]]), "m.lora_B": torch.tensor([[b]])}}, weight)
    result = stack.finalise()["g"]
    assert result["m.lora_A"].tolist() == [[0.25], [2.25]]  # p = 1/4 and 3/4, in A alone
    assert result["m.lora_B"].tolist() == [[2.0, 4.0]]
    assert (result["m.lora_B"] @ result["m.lora_A"]).item() == 9.5  # (2·1 + 3·12) / 4


def scalars(values: list[float], step: float, **named: torch.Tensor) -> Payload:
    return {"scalars": {"scalars": torch.tensor(values), "step": torch.tensor(step), **named}}


def on(*directions: int) -> torch.Tensor:
    return torch.tensor(directions, dtype=torch.int32)


def test_seed_sums_by_hand() -> None:
    """Direction 2 is measured twice by one client, and by both."""
    sums = SeedSums(4)
    sums.add(scalars([1.0, 2.0, 4.0], -0.5, directions=on(2, 0, 2)), 1)
    sums.add(scalars([8.0, -16.0], -0.25, directions=on(2, 3)), 3)
    (found,) = sums.finalise()["scalars"].values()
    # weights 1/4 and 3/4: -0.5·2 / 4; -0.5·(1 + 4) / 4 - 0.25·8·3 / 4; 0.25·16·3 / 4
    assert found.tolist() == [-0.25, 0.0, -2.125, 3.0]
    assert found.dtype == torch.float64


def test_seed_sums_of_dense_scalars_and_of_half_precision() -> None:
    """A seed stands for its words of the sign stream, mod the size."""
    seed, size = 123, 8
    where = signs.choices(seed, 6, size)
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 7.0], dtype=torch.float16)
    sums = SeedSums(size)
    sums.add(
        {
            "scalars": {
                "scalars": values,
                "step": torch.tensor(0.5),
                "seed": torch.tensor(seed),
            }
        },
        7,
    )
    wanted = [0.0] * size
    for k, value in zip(where.tolist(), values.tolist(), strict=True):
        wanted[k] += 0.5 * value
    assert sums.finalise()["scalars"]["scalars"].tolist() == wanted


def test_seed_sums_run_in_double_precision() -> None:
    sums = SeedSums(1)
    sums.add(scalars([2.0**24], 1.0, directions=on(0)), 1)
    for _ in range(1000):
        sums.add(scalars([1.0], 1.0, directions=on(0)), 1)
    assert sums.finalise()["scalars"]["scalars"].item() == (2**24 + 1000) / 1001


def test_merged_seed_sums_weigh_clients_by_examples() -> None:
    """Not partial sums by their number of clients."""
    left, right = SeedSums(2), SeedSums(2)
    left.add(scalars([1.0], 1.0, directions=on(0)), 6)
    right.add(scalars([1.0], 1.0, directions=on(1)), 1)
    right.add(scalars([3.0], 1.0, directions=on(1)), 1)
    left.merge(right)
    assert left.finalise()["scalars"]["scalars"].tolist() == [0.75, 0.5]


def test_seed_sums_of_whole_numbers_do_not_depend_on_order() -> None:
    parts = [
        (scalars([float(v) for v in range(i, i + 6)], 2.0**-i, directions=on(*range(6))), i + 1.0)
        for i in range(4)
    ]
    found = set()
    for order in itertools.permutations(parts):
        sums = SeedSums(8)
        for payload, weight in order:
            sums.add(payload, weight)
        found.add(tuple(sums.finalise()["scalars"]["scalars"].tolist()))
    assert len(found) == 1


def test_groups_have_their_own_aggregators() -> None:
    aggregator = folded(by_group, [(update(0), 1.0), (update(1, rank=3), 3.0)])
    result = aggregator.finalise()
    assert result["factors"]["m.lora_B"].shape == (7, 5)
    one, two = update(0)["head"]["bias"], update(1, rank=3)["head"]["bias"]
    assert torch.allclose(result["head"]["bias"], (one + 3 * two) / 4)


def test_only_sums_are_linear() -> None:
    assert WeightedMean().linear
    assert SeedSums(2).linear
    assert not Stack().linear
    assert not by_group().linear
    assert ByGroup({"a": WeightedMean(), "b": WeightedMean()}).linear


def test_sums_run_in_double_precision() -> None:
    """In fp32, 2²⁴ + 1 is 2²⁴: ten thousand small updates after a large one would be lost."""
    mean = WeightedMean()
    mean.add({"g": {"x": torch.tensor([2.0**24])}}, 1)
    for _ in range(10_000):
        mean.add({"g": {"x": torch.tensor([1.0])}}, 1)
    exact = (2**24 + 10_000) / 10_001
    assert mean.finalise()["g"]["x"].item() == torch.tensor(exact, dtype=torch.float32).item()


def test_a_mean_keeps_the_type_of_its_updates() -> None:
    mean = WeightedMean()
    mean.add({"g": {"x": torch.tensor([1.0], dtype=torch.bfloat16)}}, 1)
    assert mean.finalise()["g"]["x"].dtype == torch.bfloat16


@settings(max_examples=40)
@given(
    make=st.sampled_from(MAKES),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_tree_of_merges_gives_what_a_flat_list_gives(
    make: Make, weights: list[int], data: st.DataObject
) -> None:
    updates = [(update(i, rank=2 if make is WeightedMean else 1 + i), float(w))
               for i, w in enumerate(weights)]  # fmt: skip
    flat = folded(make, updates).finalise()
    forest = [folded(make, [one]) for one in data.draw(st.permutations(updates))]
    while len(forest) > 1:
        at = data.draw(st.integers(0, len(forest) - 2))
        forest[at].merge(forest.pop(at + 1))
    merged = forest[0].finalise()
    wanted = dense(flat, make)
    assert float((dense(merged, make) - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("make", MAKES)
def test_same_order_same_bits(make: Make) -> None:
    updates = [(update(i), float(i + 1)) for i in range(4)]
    flat = folded(make, updates).finalise()
    assert _same(flat, folded(make, updates).finalise())
    chain = folded(make, updates[:1])
    for one in updates[1:]:
        chain.merge(folded(make, [one]))  # the same order of sums as one by one
    assert _same(chain.finalise(), flat)


@pytest.mark.parametrize("make", MAKES)
def test_only_ratios_of_weights_count(make: Make) -> None:
    one = folded(make, [(update(0), 3), (update(1), 5)]).finalise()
    other = folded(make, [(update(0), 3e6), (update(1), 5e6)]).finalise()
    assert torch.allclose(dense(one, make), dense(other, make), rtol=1e-6)


@pytest.mark.parametrize("make", MAKES)
def test_an_empty_aggregator_is_neutral(make: Make) -> None:
    left, right = make(), folded(make, [(update(0), 3), (update(1), 5)])
    left.merge(right)
    right.merge(make())
    assert _same(left.finalise(), right.finalise())


@pytest.mark.parametrize("make", MAKES)
def test_merging_leaves_the_other_as_it_was(make: Make) -> None:
    left, right = folded(make, [(update(0), 3)]), folded(make, [(update(1), 5)])
    before = right.finalise()
    left.merge(right)
    left.add(usable(make, update(2)), 1)
    assert _same(right.finalise(), before)


@pytest.mark.parametrize("make", MAKES)
def test_updates_stay_as_they_were(make: Make) -> None:
    payload, same = update(0), update(0)
    aggregator = folded(make, [(payload, 3), (update(1), 5)])
    for params in aggregator.finalise().values():
        for tensor in params.values():
            tensor.zero_()
    assert _same(payload, same)


@pytest.mark.parametrize("make", MAKES)
def test_finalise_may_be_called_twice(make: Make) -> None:
    aggregator = folded(make, [(update(0), 3), (update(1), 5)])
    assert _same(aggregator.finalise(), aggregator.finalise())


@pytest.mark.parametrize("make", [WeightedMean, by_group])
def test_an_empty_group_is_kept(make: Make) -> None:
    one, two = (folded(make, [(update(i, head=False), 1)]) for i in range(2))
    one.merge(two)
    assert one.finalise()["head"] == {}


@pytest.mark.parametrize("make", MAKES)
def test_nothing_to_aggregate_is_an_error(make: Make) -> None:
    with pytest.raises(ValueError, match="weights sum to 0"):
        make().finalise()
    with pytest.raises(ValueError, match="weights sum to 0"):
        folded(make, [(update(0), 0.0)]).finalise()


# Sums, and means with what their product lacks


def test_a_sum_by_hand_counts_no_weights() -> None:
    left, right = Sum(), Sum()
    left.add({"g": {"x": torch.tensor([1.0, 10.0])}}, 5)
    right.add({"g": {"x": torch.tensor([2.0, -4.0])}}, 0)
    right.add({"g": {"x": torch.tensor([4.0, 1.0])}}, 1)
    left.merge(right)
    assert left.finalise()["g"]["x"].tolist() == [7.0, 7.0]
    assert right.finalise()["g"]["x"].tolist() == [6.0, -3.0]  # as it was
    assert left.linear
    with pytest.raises(ValueError, match="nothing to sum"):
        Sum().finalise()


def test_a_sum_runs_in_double_precision() -> None:
    total = Sum()
    total.add({"g": {"x": torch.tensor([2.0**24])}}, 1)
    for _ in range(1000):
        total.add({"g": {"x": torch.tensor([1.0])}}, 1)
    assert total.finalise()["g"]["x"].item() == pytest.approx(2**24 + 1000, rel=1e-7)


def residual_of(updates: Sequence[tuple[Payload, float]]) -> MeanAndResidual:
    aggregator = MeanAndResidual()
    for payload, weight in updates:
        head, own = payload["head"], payload["factors"]
        aggregator.add({"adapter": {**own, **head}}, weight)
    return aggregator


def test_mean_and_residual_is_the_mean_of_products_for_any_tree() -> None:
    updates = [(update(i), float(1 + i)) for i in range(4)]
    flat = residual_of(updates).finalise()
    ideal = torch.stack([w / 10 * dense({"factors": p["factors"]}, Stack) for p, w in updates])
    for order in itertools.permutations(updates):
        left, right = residual_of(order[:1]), residual_of(order[1:3])
        right.merge(residual_of(order[3:]))
        left.merge(right)
        merged = left.finalise()
        parts = [dense({"factors": merged[g]}, Stack) for g in ("adapter", "residual")]
        assert float((sum(parts) - ideal.sum(0)).norm() / ideal.sum(0).norm()) < 1e-6
        bias = merged["adapter"]["bias"]
        assert torch.allclose(bias, flat["adapter"]["bias"], atol=1e-6)
    assert flat["residual"].keys() == {"m.lora_A", "m.lora_B"}  # a head has none
    assert flat["residual"]["m.lora_A"].dtype == torch.float32
    assert not MeanAndResidual().linear


def test_a_common_start_leaves_the_residual_alone() -> None:
    """Clients send differences: (B - B₀)(A - A₀) has the same covariance as B A."""
    updates = [(update(i), float(1 + i)) for i in range(3)]
    start = update(9)["factors"]
    shifted = [
        ({**p, "factors": {n: t - start[n] for n, t in p["factors"].items()}}, w)
        for p, w in updates
    ]
    found, wanted = (
        dense({"factors": residual_of(own).finalise()["residual"]}, Stack)
        for own in (shifted, updates)
    )
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_one_client_leaves_a_residual_without_rank() -> None:
    residual = residual_of([(update(0), 3.0)]).finalise()["residual"]
    assert {n: tuple(t.shape) for n, t in residual.items()} == {
        "m.lora_A": (0, 5),
        "m.lora_B": (7, 0),
    }
    with pytest.raises(ValueError, match="weights sum to 0"):
        MeanAndResidual().finalise()


def _same(one: Payload, other: Payload) -> bool:
    return one.keys() == other.keys() and all(
        one[g].keys() == other[g].keys()
        and all(torch.equal(one[g][n], other[g][n]) for n in one[g])
        for g in one
    )


def test_a_module_that_a_client_does_not_send_counts_as_no_change_of_it() -> None:
    """p = 1/4 and 3/4; the second sends m alone: j becomes 8/4, not 8."""
    mean = WeightedMean()
    mean.add({"factors": {"m": torch.tensor([4.0]), "j": torch.tensor([8.0])}}, 1)
    mean.add({"factors": {"m": torch.tensor([12.0])}}, 3)
    found = mean.finalise()["factors"]
    assert found["m"].tolist() == [10.0]
    assert found["j"].tolist() == [2.0]
