"""Partial aggregates of all strategies: sums that travel give what the updates themselves give."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla import seeds
from corolla.aggregation.stacks import Stack
from corolla.aggregation.sums import ByGroup, Sum, WeightedMean, summable
from corolla.interfaces import Strategy, Summable
from corolla.strategies import registry
from corolla.types import Params, Payload, Size, TrainerName
from corolla.wire import codec

NEED_ALL_UPDATES = {"flora", "fedex_lora", "flexlora", "lora_fair", "hetlora"}
LINEAR = sorted(registry.STRATEGIES.keys() - NEED_ALL_UPDATES)
FRESH: Params = {
    "m.lora_A": torch.zeros(2, 5),
    "m.lora_B": torch.zeros(7, 2),
    "n.lora_A": torch.zeros(2, 3),
    "n.lora_B": torch.zeros(4, 2),
    "classifier.bias": torch.zeros(3),
}
Tree = Any
"""The number of a client, or a list of trees."""


def build(name: str) -> Strategy:
    small = {"size": 16} if name in ("seed_pool", "fedkseed", "fedkseed_pro", "mixed") else {}
    return registry.create(name, {**small, **({"size": 16} if name == "ferret" else {})})


def new(strategy: Strategy) -> Summable:
    found = summable(strategy.aggregator())
    assert found is not None
    return found


def like_of(strategy: Strategy, client: int, trainer: TrainerName) -> Payload:
    """What an update of a client looks like: its own seed, the same step for all."""
    step = float(torch.tensor(-0.01, dtype=torch.float32))
    size = Size(31, 22, 3, 9, trainer, 1000 + client, step, round=1, rank=2, modules=2)
    return strategy.update_like(FRESH, size)


def random_like(like: Payload, client: int) -> Payload:
    """An update of a form: random values, random directions, the seed and step that are given."""
    generator = seeds.generator(client, "update")

    def value(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            return tensor
        if not tensor.is_floating_point():
            return (torch.rand(tensor.shape, generator=generator) * (tensor + 1)).to(tensor.dtype)
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return {group: {n: value(t) for n, t in own.items()} for group, own in like.items()}


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for part in tree for leaf in leaves(part)]


def weight(client: int) -> int:
    return 1 + 7 * client % 13


def fold(strategy: Strategy, tree: Sequence[Tree], trainer: TrainerName) -> Summable:
    """Every list is a gateway: what is in it travels to the next one as bytes of sums."""
    aggregator = new(strategy)
    for part in tree:
        like = like_of(strategy, leaves(part)[0], trainer)
        if isinstance(part, int):
            aggregator.add(random_like(like, part), float(weight(part)))
            continue
        sums = fold(strategy, part, trainer).sums()
        sent = codec.decode(codec.encode(sums))
        assert forms(sent) == forms(new(strategy).sums_like(like))
        aggregator.absorb(sent, float(sum(map(weight, leaves(part)))), like)
    return aggregator


def forms(payload: Payload) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    return {
        group: {n: (t.dtype, tuple(t.shape)) for n, t in own.items()}
        for group, own in payload.items()
    }


def trees(clients: int) -> st.SearchStrategy[Tree]:
    """All clients in their order, in gateways of gateways."""

    def grouped(parts: list[Tree]) -> st.SearchStrategy[Tree]:
        if len(parts) < 2:
            return st.just(parts)
        cuts = st.lists(st.integers(1, len(parts) - 1), unique=True, max_size=3).map(sorted)
        return cuts.flatmap(lambda at: nested(parts, at))

    def nested(parts: list[Tree], at: list[int]) -> st.SearchStrategy[Tree]:
        edges = [0, *at, len(parts)]
        pieces = [parts[a:b] for a, b in itertools.pairwise(edges)]
        if len(pieces) == 1:
            return st.just(parts)
        return st.tuples(
            *(grouped(p) if len(p) > 1 else st.sampled_from([p, p[0]]) for p in pieces)
        ).map(list)

    return grouped(list(range(clients)))


def compare(found: Payload, wanted: Payload) -> None:
    """To the bit in float32, and as near as sums in float64 are."""
    assert forms(found) == forms(wanted)
    for group, own in wanted.items():
        for name, tensor in own.items():
            rtol, atol = (1e-12, 1e-13) if tensor.dtype == torch.float64 else (0.0, 0.0)
            torch.testing.assert_close(
                found[group][name], tensor, rtol=rtol, atol=atol, equal_nan=True
            )


@settings(max_examples=15)
@pytest.mark.parametrize("name", LINEAR)
@given(tree=trees(7))
def test_any_tree_of_gateways_gives_what_all_clients_give(name: str, tree: Tree) -> None:
    strategy = build(name)
    for trainer in strategy.trainers:
        flat = fold(strategy, leaves(tree), trainer)
        compare(fold(strategy, tree, trainer).finalise(), flat.finalise())


def test_gateways_of_both_classes_of_a_mixed_federation() -> None:
    """A gateway's phones are of one class; the server folds both."""
    strategy = build("mixed")
    flat, nested = new(strategy), new(strategy)
    for trainer, clients in ((strategy.trainers[0], (0, 1, 2)), (strategy.trainers[1], (3, 4))):
        for client in clients:
            like = like_of(strategy, client, trainer)
            flat.add(random_like(like, client), float(weight(client)))
        sums = codec.decode(codec.encode(fold(strategy, clients, trainer).sums()))
        nested.absorb(sums, float(sum(map(weight, clients))), like)
    compare(nested.finalise(), flat.finalise())


def test_a_gateway_whose_phones_are_of_both_classes_of_a_mixed_federation() -> None:
    strategy = build("mixed")
    likes = [like_of(strategy, c, strategy.trainers[c > 2]) for c in range(5)]
    flat, gateway, server = (new(strategy) for _ in range(3))
    for client, like in enumerate(likes):
        for aggregator in (flat, gateway):
            aggregator.add(random_like(like, client), float(weight(client)))
    sums = codec.decode(codec.encode(gateway.sums()))
    joined = {**likes[0], **likes[4]}
    assert forms(sums) == forms(new(strategy).sums_like(joined))
    server.absorb(sums, float(sum(map(weight, range(5)))), joined)
    compare(server.finalise(), flat.finalise())


def test_a_mean_through_gateways_is_that_of_plain_float64() -> None:
    strategy = build("fedavg")
    tree = [0, [1, [2, 3], 4], [5]]
    updates = [random_like({"adapter": FRESH}, client)["adapter"] for client in range(6)]
    total = sum(map(weight, range(6)))
    for name, tensor in fold(strategy, tree, "first_order").finalise()["adapter"].items():
        mean = sum(weight(c) * u[name].numpy().astype("float64") for c, u in enumerate(updates))
        torch.testing.assert_close(tensor, torch.tensor(mean / total).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", registry.STRATEGIES)
def test_what_needs_single_updates_has_no_sums(name: str) -> None:
    aggregator = registry.find(name)().aggregator()
    assert (summable(aggregator) is None) == (name in NEED_ALL_UPDATES)
    assert aggregator.linear == (name not in NEED_ALL_UPDATES)


@pytest.mark.parametrize("name", LINEAR)
def test_no_sum_is_taken_for_scalars_that_travel_in_a_header(name: str) -> None:
    strategy = build(name)
    for trainer in strategy.trainers:
        like = like_of(strategy, 0, trainer)
        for own in new(strategy).sums_like(like).values():
            assert "scalars" not in own
            assert all(t.dtype == torch.float64 for t in own.values())


def test_a_group_without_tensors_stays() -> None:
    """A model without a head has an empty group "head"."""
    aggregator = WeightedMean()
    like: Payload = {"adapter": {"m": torch.ones(2)}, "head": {}}
    aggregator.absorb(codec.decode(codec.encode(aggregator.sums_like(like))), 4.0, like)
    assert aggregator.finalise().keys() == {"adapter", "head"}


def test_groups_are_sums_only_where_all_of_them_are() -> None:
    assert summable(ByGroup({"a": WeightedMean(), "b": Sum()})) is not None
    both = ByGroup({"a": WeightedMean(), "b": Stack()})
    assert summable(both) is None
    with pytest.raises(ValueError, match=r"not sums: \['b'\]"):
        both.sums()


class TestHostile:
    """Statistics that no updates have are refused, and leave an aggregator as it was."""

    CLIENTS = (0, 1, 2)
    TOTAL = sum(map(weight, CLIENTS))

    def refused(
        self, name: str, trainer: TrainerName, group: str, changes: Mapping[str, Any]
    ) -> None:
        strategy = build(name)
        like = like_of(strategy, 0, trainer)
        sums = {g: dict(own) for g, own in fold(strategy, self.CLIENTS, trainer).sums().items()}
        for tensor, change in changes.items():
            sums[group][tensor] = change(sums[group][tensor].clone())
        aggregator = fold(strategy, [3], trainer)
        before = aggregator.finalise()
        with pytest.raises(ValueError, match="no updates have"):
            aggregator.absorb(sums, float(self.TOTAL), like)
        compare(aggregator.finalise(), before)

    @pytest.mark.parametrize(
        "changes",
        [
            {"sum.counts": lambda t: t.neg_()},
            {"sum.counts": lambda t: t.add_(0.5)},
            {"sum.counts": lambda t: t.add_(10**6), "sum.magnitudes": lambda t: t},
            {"sum.magnitudes": lambda t: t.sub_(1e6)},
            {"sum.magnitudes": lambda t: t.add_(1e6)},
            {"sum.magnitudes": lambda t: t.mul_(math.nan)},
        ],
    )
    def test_history_of_fedkseed_pro(self, changes: Mapping[str, Any]) -> None:
        self.refused("fedkseed_pro", "zeroth_order", "history", changes)

    @pytest.mark.parametrize("trainer", ["first_order", "zeroth_order"])
    @pytest.mark.parametrize("row", range(4))
    @pytest.mark.parametrize("value", [-1.0, 0.5, 1e9, math.nan, 0.0])
    def test_counts_of_mixed(self, trainer: TrainerName, row: int, value: float) -> None:
        column = 0 if trainer == "first_order" else 1
        if row == 2:
            value = min(value, 1e-9)  # a larger spread only lowers the weight of its class

        def change(counts: torch.Tensor) -> torch.Tensor:
            counts[row, column] = value
            return counts

        self.refused("mixed", trainer, "counts", {"sum.counts": change})

    def test_counts_of_mixed_for_the_other_class(self) -> None:
        def change(counts: torch.Tensor) -> torch.Tensor:
            counts[0] = counts[0].flip(0)
            return counts

        self.refused("mixed", "first_order", "counts", {"sum.counts": change})
