import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from corolla import seeds
from corolla.config.build import build_strategy
from corolla.directions import signs
from corolla.errors import ConfigError
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import run_round
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.mixed import Mixed
from corolla.tensors import tree
from corolla.types import Cost, Params, Payload, Size
from tests.strategies import devices, tiny

CLASSES = {"big": {"trainer": "first_order"}, "small": {"trainer": "zeroth_order", "lr": 1e-3}}
D = 64  # a multiple of the sizes below: all blocks are full
START: Params = {
    "m.lora_A": torch.linspace(-1, 1, 40).view(4, 10),
    "m.lora_B": torch.linspace(2, 3, 24).view(6, 4),
}


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].detach().double().reshape(-1) for n in sorted(params)])


def z(seed: int, round: int, k: int, count: int = D) -> Tensor:
    """From the definition, in fp64."""
    signed = torch.from_numpy(signs.signs((seeds.derive(seed, "directions"), round), 0, count))
    return signed.double() * torch.tensor([(-1) ** (k & i).bit_count() for i in range(count)])


def first(n: int, seed: int, scale: float = 0.1, at: Params = START) -> tiny.Scripted:
    """A client whose training moves it by noise."""
    generator = torch.Generator().manual_seed(seed)
    end = {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in at.items()}
    return tiny.Scripted(end, n)


def zeroth(n: int, seed: int, scale: float = 0.1, count: int = 6) -> tiny.Scripted:
    """A client that measured noise."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return tiny.Scripted({}, n, seed=seed, kind="zeroth_order", scalars=drawn, step=-scale)


def update(member: tiny.Scripted, size: int, seed: int, round: int, at: Params = START) -> Tensor:
    """The dense update of a client, for a zeroth-order one direction at a time."""
    if member.kind == "first_order":
        return flat(member.outcome) - flat(at)
    total = torch.zeros(D, dtype=torch.float64)
    words = signs.words((member.seed, 0), 0, len(member.scalars), stream=1)
    for word, g in zip(words, member.scalars, strict=True):
        total += member.step * g * z(seed, round, int(word) % size)
    return total


def make(weights: str = "examples", size: int = 16) -> Mixed:
    chosen: Any = weights
    return Mixed(size=size, weights=chosen)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# By hand


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_step_is_the_mean_over_all_clients(size: int) -> None:
    """λ by examples: both classes count as if all had sent dense updates."""
    strategy = make(size=size)
    state: Payload = strategy.init(START, 7)
    at = flat(START)
    for round in (1, 2, 3):
        here = state["adapter"]
        members = [
            first(1, 10 + round, at=here),
            zeroth(5, 20),
            zeroth(2, 30),
            first(4, 40, at=here),
        ]
        state = tiny.play(strategy, state, members)
        total = sum(member.num_examples for member in members)
        at = at + torch.stack(
            [m.num_examples / total * update(m, size, 7, round, here) for m in members]
        ).sum(0)
        assert relative(flat(state["adapter"]), at) < 1e-6
    assert {n: t.shape for n, t in state["adapter"].items()} == {
        n: t.shape for n, t in START.items()
    }


def test_one_class_alone_is_the_mean_of_that_class() -> None:
    strategy = make()
    state = strategy.init(START, 7)
    members = [first(1, 1), first(3, 2)]
    alone = tiny.play(strategy, state, members)
    averaged = tiny.play(FedAvg(), FedAvg().init(START, 7), members)
    assert relative(flat(alone["adapter"]), flat(averaged["adapter"])) < 1e-7
    measured = [zeroth(1, 1), zeroth(3, 2)]
    found = tiny.play(strategy, state, measured)
    wanted = (
        flat(START) + 0.25 * update(measured[0], 16, 7, 1) + 0.75 * update(measured[1], 16, 7, 1)
    )
    assert relative(flat(found["adapter"]), wanted) < 1e-6


def apply(strategy: Mixed, state: Payload, members: Sequence[tiny.Scripted]) -> tuple[Payload, Any]:
    aggregator = strategy.aggregator()
    for member in members:
        sent = strategy.local(member, tiny.seen(strategy.broadcast(state), state))
        aggregator.add(sent.payload, sent.num_examples)
    return strategy.apply(state, aggregator.finalise())


def class_mean(members: Sequence[tiny.Scripted], size: int) -> tuple[Tensor, float]:
    """(mean update of a class by examples, its square over its estimated variance), dense."""
    total = sum(member.num_examples for member in members)
    own = torch.stack([update(member, size, 7, 1) for member in members])
    shares = torch.tensor([m.num_examples / total for m in members], dtype=torch.float64)
    mean = shares @ own
    spread = float(shares @ (own - mean).square().sum(1))
    effective = 1 / float(shares.square().sum())  # as many clients of equal shares
    return mean, float(mean.square().sum()) / (spread / (effective - 1))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("noise", [0.01, 1.0])
@pytest.mark.parametrize("examples", [(5, 2), (3, 3)])
def test_inverse_variance_is_its_formula(
    size: int, noise: float, examples: tuple[int, int]
) -> None:
    strategy = make("inverse_variance", size)
    state = strategy.init(START, 7)
    ones = [first(1, 1), first(4, 2), first(2, 3)]
    zeros = [zeroth(examples[0], 4, noise), zeroth(examples[1], 5, noise)]
    after, said = apply(strategy, state, [*ones, *zeros])
    (mean_1, precise_1), (mean_0, precise_0) = class_mean(ones, size), class_mean(zeros, size)
    share_1 = precise_1 / (precise_1 + precise_0)
    assert 0.1 < share_1 < 0.9
    assert said["first_order_share"] == pytest.approx(share_1, rel=1e-5)
    assert said["zeroth_order_share"] == pytest.approx(1 - share_1, rel=1e-5, abs=1e-9)
    wanted = flat(START) + share_1 * mean_1 + (1 - share_1) * mean_0
    assert relative(flat(after["adapter"]), wanted) < 1e-6


def test_the_spread_over_the_mean_estimates_its_variance() -> None:
    """s² Σp² / (1 - Σp²) of clients with unequal shares: on average the variance of Σ p u."""
    shares = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    u = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = u @ shares
    spread = ((u - mean[:, None]).square() @ shares).mean()
    square = float(shares.square().sum())
    assert float(spread) * square / (1 - square) == pytest.approx(float(mean.var()), rel=0.01)


def agreeing(n: int, seed: int, noise: float, scale: float) -> list[tiny.Scripted]:
    """Two zeroth-order clients that measured the same slopes, but for noise."""
    slopes = torch.linspace(1, 2, 6)
    made = []
    for own in (2 * seed, 2 * seed + 1):
        drawn = slopes + noise * torch.randn(6, generator=torch.Generator().manual_seed(own))
        found = tiny.Scripted(
            {}, n, seed=4, kind="zeroth_order", scalars=drawn.tolist(), step=-scale
        )
        made.append(found)
    return made


def test_the_noisier_class_counts_for_less() -> None:
    strategy = make("inverse_variance")
    state = strategy.init(START, 7)
    shares = []
    for noise in (0.01, 0.5, 5.0, 500.0):
        members = [first(3, 1), first(3, 2), *agreeing(3, 4, noise, 0.1)]
        shares.append(apply(strategy, state, members)[1]["zeroth_order_share"])
    assert shares[0] > 0.99 > shares[1] > shares[2] > shares[3]


def test_a_smaller_learning_rate_is_not_more_certain() -> None:
    """A class whose updates are all a thousand times smaller keeps its share."""
    strategy = make("inverse_variance")
    state = strategy.init(START, 7)
    shares = []
    for scale in (1e-4, 0.1, 10.0):
        members = [first(3, 1), first(3, 2), *agreeing(3, 4, 1.0, scale)]
        shares.append(apply(strategy, state, members)[1]["zeroth_order_share"])
    assert shares == pytest.approx([shares[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    "members",
    [
        [first(1, 1), zeroth(3, 2), zeroth(2, 3)],
        [first(1, 1), first(2, 4), zeroth(3, 2)],
        [first(1, 1), first(2, 4)],
        [zeroth(1, 1), zeroth(2, 4)],
        [first(1, 1), first(2, 1), zeroth(3, 2), zeroth(2, 3)],  # two equal updates: no spread
        [first(1, 1), first(2, 4), zeroth(3, 2, 0.0), zeroth(2, 3, 0.0)],  # nothing was measured
    ],
)
def test_without_a_spread_to_estimate_examples_decide(members: list[tiny.Scripted]) -> None:
    found, said = apply(make("inverse_variance"), make().init(START, 7), members)
    usual, by_examples = apply(make("examples"), make().init(START, 7), members)
    assert said == by_examples
    assert tiny.same(found["adapter"], usual["adapter"])
    ones = sum(m.num_examples for m in members if m.kind == "first_order")
    total = sum(m.num_examples for m in members)
    assert said["first_order_share"] == pytest.approx(ones / total)
    assert said["first_order_share"] + said["zeroth_order_share"] == pytest.approx(1)


def test_any_order_and_tree_gives_the_same_step() -> None:
    strategy = make("inverse_variance")
    state = strategy.init(START, 7)
    received = tiny.seen(strategy.broadcast(state), state)
    members = [first(1, 1), first(4, 2), zeroth(5, 4), zeroth(2, 5)]
    sent = [strategy.local(member, received) for member in members]
    found = []
    for order in itertools.permutations(sent):
        for cut in (0, 2, 3):
            left, right = strategy.aggregator(), strategy.aggregator()
            for side, some in ((left, order[:cut]), (right, order[cut:])):
                for one in some:
                    side.add(one.payload, one.num_examples)
            left.merge(right)
            after, said = strategy.apply(state, left.finalise())
            found.append((flat(after["adapter"]), said["first_order_share"]))
    assert all(relative(end, found[0][0]) < 1e-6 for end, _ in found)
    assert all(share == pytest.approx(found[0][1], rel=1e-9) for _, share in found)


def test_many_examples_are_counted_to_the_last() -> None:
    """fp32 has no 16,777,217, and loses what a square has beyond 7 digits."""
    aggregator, n = make("inverse_variance").aggregator(), 16_777_217
    for member in (first(n, 1), zeroth(n, 2)):
        own = make().local(member, make().init(START, 7))
        aggregator.add(own.payload, float(n))
    counts = aggregator.finalise()["counts"]
    assert counts["examples"].tolist() == [n, n]
    assert aggregator.sums()["counts"]["sum.counts"][3].tolist() == [n**2, n**2]


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        make().aggregator().finalise()


def test_signs_are_new_in_each_round() -> None:
    strategy = make()
    state = strategy.init(START, 7)
    pools = []
    for _ in range(3):
        member = zeroth(1, 4)
        state = tiny.play(strategy, state, [member])
        pools.append(member.asked[0]["pool"])
    key = seeds.derive(7, "directions")
    assert [pool.key for pool in pools] == [(key, 1), (key, 2), (key, 3)]


@pytest.mark.parametrize("options", [{"size": 100}, {"weights": "equal"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Mixed(**options)


def test_the_cost_depends_on_how_a_client_trains() -> None:
    sizes = [Size(10, 20, 3, 7, "first_order"), Size(10, 20, 3, 7, "zeroth_order")]
    assert make().cost(sizes) == [Cost(4 * 33, 4 * 33 + 16), Cost(4 * 7 + 8, 4 * 33 + 16)]


# Real rounds


@pytest.mark.parametrize("weights", ["examples", "inverse_variance"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_both_classes_train_in_one_round(
    kind: str, weights: Literal["examples", "inverse_variance"], tmp_path: Path
) -> None:
    run = devices.start(
        kind,
        tmp_path,
        strategy="mixed",
        options={"size": 64, "weights": weights},
        classes=CLASSES,
        local_steps=3,
    )
    values = sum(t.numel() for t in run.state["adapter"].values())
    for _ in range(2):
        before = flat(run.state["adapter"])
        result = run.step()
        sent = {c: set(reply.scalars) for c, reply in run.network.replies.items()}
        assert sent == {"a": set(), "b": {"scalars"}, "c": set(), "d": {"scalars"}}
        assert result.traffic.up == 2 * 4 * values + 2 * (4 * 3 + 8) == result.cost.up
        assert result.traffic.down == 4 * (4 * values + 16) == result.cost.down
        moved = {c: flat(held) - before for c, held in run.network.weights.items()}
        shares = [result.metrics[f"{name}_order_share"] for name in ("first", "zeroth")]
        assert sum(shares) == pytest.approx(1)
        n = result.num_examples
        if weights == "examples":
            assert shares[0] == pytest.approx((n["a"] + n["c"]) / sum(n.values()))
        wanted = before
        for share, members in zip(shares, ("ac", "bd"), strict=True):
            total = sum(n[c] for c in members)
            for c in members:
                wanted = wanted + share * n[c] / total * moved[c]
        assert relative(flat(run.state["adapter"]), wanted) < 1e-6
    assert run.hashes() == dict.fromkeys("abcd", run.server())


def test_the_order_of_clients_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for reverse in (False, True):
        run = devices.start(
            "llama",
            tmp_path / str(reverse),
            reverse=reverse,
            strategy="mixed",
            options={"weights": "inverse_variance"},
            classes=CLASSES,
            dropout=0.2,
        )
        run.step()
        run.step()
        found.append(tree.digest_all(run.state))
    assert found[0] == found[1]


@pytest.mark.parametrize("trainers", [[], ["first_order"], ["zeroth_order", "zeroth_order"]])
def test_both_trainers_must_occur(trainers: list[str]) -> None:
    classes = {f"class{n}": {"trainer": trainer} for n, trainer in enumerate(trainers)}
    with pytest.raises(ConfigError, match="needs classes of clients with trainers") as said:
        build_strategy(tiny.config("mixed", classes=classes))
    assert "\n" not in str(said.value)
    usual = {"pc": {}, "phone": {"trainer": "zeroth_order"}}  # without one: the first
    build_strategy(tiny.config("mixed", classes=usual))


def test_a_device_that_measured_other_directions_is_dropped(tmp_path: Path) -> None:
    """Its seed is known to the server: with another one, its scalars would be noise to all."""
    run = devices.start("llama", tmp_path, strategy="mixed", classes=CLASSES)
    worker = run.network.worker("b")
    worker.config = worker.config.model_copy(update={"seed": worker.config.seed + 1})
    config = run.federation.config.model_copy(update={"cohort": 4})
    result = run_round(
        RoundCall(replace(run.federation, config=config), run.state, {}, 1), run.network
    )
    assert list(result.dropped) == ["b"]
    assert "update has seed" in result.dropped["b"]
    assert sorted(result.num_examples) == ["a", "c", "d"]


def test_a_client_that_sends_what_the_other_class_sends_is_dropped(tmp_path: Path) -> None:
    run = devices.start("llama", tmp_path, strategy="mixed", classes=CLASSES)
    worker = run.network.worker("a")
    names = {"big": worker.config.classes["small"], "small": worker.config.classes["big"]}
    worker.config = worker.config.model_copy(update={"classes": names})
    config = run.federation.config.model_copy(update={"cohort": 4})
    own = replace(run.federation, config=config)
    result = run_round(RoundCall(own, run.state, {}, 1), run.network)
    assert list(result.dropped) == ["a"]
    assert "groups" in result.dropped["a"]
    assert sorted(result.num_examples) == ["b", "c", "d"]
