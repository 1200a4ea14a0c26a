"""Differential privacy: what is bounded, what is added, what is accounted, what is refused."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corolla.aggregation.sums import WeightedMean
from corolla.config.asked import not_noised
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.privacy import accounting, randomness
from corolla.privacy.accounting import Release
from corolla.privacy.calibration import client_plan, planned_rounds
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.example_level import ExampleLevel, example_level
from corolla.privacy.guarantee import Guarantee
from corolla.privacy.randomness import Normal, clip_factors, os_normal, os_uniform
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing import registry
from corolla.types import Payload
from corolla.wire import codec
from tests.corolla.privacy import privacy_checks as checks
from tests.corolla.privacy.privacy_checks import C, config, filled, flat, level, release, silent

WITH_NOISE = [name for name, own in registry.STRATEGIES.items() if not not_noised(own())]
W: Payload = {"adapter": {"w": torch.zeros(3, dtype=torch.float64)}}
DELTA = 1e-5


class Seeded:
    """N(0, 1) that can be drawn again; `drawn` holds what was."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[Tensor] = []

    def __call__(self, shape: Sequence[int]) -> Tensor:
        noise = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        self.drawn.append(noise)
        return noise


# --- chance


def test_normals_are_normal() -> None:
    checks.is_normal(os_normal((700, 500)).flatten())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 0, 4)])
def test_normals_of_every_shape(shape: tuple[int, ...]) -> None:
    found = os_normal(shape)
    assert found.shape == shape
    assert found.dtype == torch.float64


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_normals_are_finite_whatever_the_system_gives(
    byte: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", lambda n: byte * n)
    assert bool(os_normal((5,)).isfinite().all())
    assert bool((os_uniform(5) < 1).all())
    assert bool((os_uniform(5) >= 0).all())


def test_uniforms_have_53_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([0, 1 << 11, (1 << 11) - 1, -1], dtype=torch.int64)
    monkeypatch.setattr("os.urandom", lambda n: words.numpy().tobytes())
    assert os_uniform(4).tolist() == [0, 2.0**-53, 0, 1 - 2.0**-53]


def test_noise_is_of_the_operating_system() -> None:
    checks.noise_is_of_the_operating_system()


# --- what bounds


def test_clip_factors() -> None:
    norms = torch.tensor([0.0, 0.5, 2.0, 8.0, math.inf, -math.inf, math.nan])
    assert clip_factors(norms, 2.0).tolist() == [1, 1, 1, 0.25, 0, 0, 0]
    assert clip_factors(torch.tensor(1e300, dtype=torch.float64), 1.0) == 1e-300


@pytest.mark.parametrize("strategy", WITH_NOISE)
def test_one_client_moves_the_sum_by_at_most_the_clip(strategy: str) -> None:
    """Whatever it sends and claims to weigh, in the form of every strategy."""
    checks.sensitivity_is_at_most_the_clip(strategy)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    weights=st.lists(st.floats(allow_nan=True), min_size=6, max_size=6),
)
def test_one_client_of_any(values: list[list[float]], weights: list[float]) -> None:
    like: Payload = {"a": {"x": torch.zeros(2), "y": torch.zeros(())}, "b": {"x": torch.zeros(1)}}
    updates = [
        (
            {
                "a": {"x": torch.tensor(v[:2]), "y": torch.tensor(v[2])},
                "b": {"x": torch.tensor(v[3:])},
            },
            w,
        )
        for v, w in zip(values, weights, strict=False)
    ]
    own = level(normal=silent)
    whole = flat(release(own, updates, like)[0]) * own.cohort
    for i in range(len(updates)):
        part = flat(release(own, updates[:i] + updates[i + 1 :], like)[0]) * own.cohort
        assert float((whole - part).norm()) <= C * (1 + 1e-5)


@pytest.mark.parametrize("strategy", WITH_NOISE)
def test_without_noise_it_is_what_the_strategy_would_have_applied(strategy: str) -> None:
    """Of clients of equal weight, if none is clipped; and it applies it, noise and all."""
    known, like = registry.create(strategy), checks.form(strategy)
    updates = [checks.random(like, seed) for seed in range(10)]
    usual = known.aggregator()
    for update in updates:
        usual.add(update, 1.0)
    wanted = usual.finalise()
    weighted = [(update, 3.0 + i) for i, update in enumerate(updates)]
    found = release(level(normal=silent, clip=1e6), weighted, like, strategy)[0]
    for group, params in wanted.items():
        for name, tensor in params.items():
            assert torch.allclose(found[group][name], tensor, atol=1e-6)
            assert found[group][name].dtype == tensor.dtype
    state = known.init(checks.fresh(), 0)
    noisy = release(level(noise_multiplier=1e3), [], like, strategy)[0]
    after, _ = known.apply(state, noisy)
    assert bool(flat(after).isfinite().all())
    assert not torch.equal(flat(after), flat(state))


def test_the_contribution_of_a_zeroth_order_client_is_its_move() -> None:
    """Σ_t step g_t e_{k_t}, clipped as one vector of K values."""
    like = checks.form("fedkseed")
    scalars = torch.tensor([3.0, 1.0, -2.0, 0.0, 0.0, 0.0, 4.0])
    where = torch.tensor([5, 7, 5, 1, 1, 2, 9], dtype=torch.int32)
    update = {"scalars": {**like["scalars"], "scalars": scalars, "directions": where}}
    moved = torch.zeros(4096, dtype=torch.float64)
    for k, g in zip(where.tolist(), scalars.tolist(), strict=True):
        moved[k] += float(like["scalars"]["step"]) * g
    found = release(level(normal=silent), [(update, 9.0)], like, "fedkseed")[0]
    wanted = moved * min(1.0, C / float(moved.norm())) / 10
    assert torch.allclose(found["scalars"]["scalars"], wanted, rtol=1e-12)


def test_an_update_of_another_shape_is_no_part_of_a_sum() -> None:
    """Broadcasting would count one value many times."""
    own = level().aggregator(registry.create("fedavg").aggregator, {}, W)
    with pytest.raises(ValueError, match="does not have the form"):
        own.add({"adapter": {"w": torch.ones(1)}}, 1.0)
    with pytest.raises(ValueError, match="does not have the form"):
        own.add({"adapter": {"w": torch.ones(3), "v": torch.ones(3)}}, 1.0)


def test_a_clipped_sum_is_not_given_out_without_noise() -> None:
    make = registry.create("fedavg").aggregator
    own, other = (level().aggregator(make, {}, W) for _ in range(2))
    assert own.linear
    own.add(filled(W, torch.ones_like), 1.0)
    other.add(filled(W, torch.zeros_like), 1.0)
    other.merge(own)
    assert (other.clients, other.within) == (2, 1)
    assert float(flat(other.total).norm()) == pytest.approx(C)
    with pytest.raises(ValueError, match="with noise"):
        own.finalise()


# --- what is added


@pytest.mark.parametrize("clients", [0, 2, 10])
def test_noise_has_its_std_whoever_answers(clients: int) -> None:
    checks.noise_has_its_std(clients)


@pytest.mark.parametrize("changes", [{"clip_quantile": 0.5}, {"epsilon": 8.0}])
def test_noise_has_its_std_in_every_mode(changes: dict[str, Any]) -> None:
    if "clip_quantile" not in changes:
        checks.noise_has_its_std(**changes)
        return
    own = level(cohort=20, **changes)
    like: Payload = {"adapter": {"w": torch.zeros(200_000, dtype=torch.float64)}}
    found, _, metrics = release(own, [], like)
    checks.is_normal(found["adapter"]["w"] / metrics["noise_std"])
    assert metrics["noise_std"] > own.noise_multiplier * C / 20  # what the count leaves over


def test_denominator_is_the_planned_cohort() -> None:
    checks.denominator_is_the_planned_cohort()


def test_noise_is_added_once_over_all_groups_in_the_order_of_names() -> None:
    like: Payload = {
        "head": {"v": torch.zeros(2), "a": torch.zeros(())},
        "adapter": {"w": torch.zeros(3), "b": torch.zeros(1, 2)},
        "empty": {},
    }
    normal = Seeded()
    own = level(normal=normal)
    one = filled(like, lambda t: torch.full_like(t, 0.1))
    found = release(own, [(one, 1.0)], like)[0]
    shapes = [(1, 2), (3,), (), (2,)]  # adapter/b, adapter/w, head/a, head/v
    assert [tuple(noise.shape) for noise in normal.drawn] == shapes
    names = [("adapter", "b"), ("adapter", "w"), ("head", "a"), ("head", "v")]
    for (group, name), noise in zip(names, normal.drawn, strict=True):
        wanted = (0.1 + C * noise) / 10
        assert torch.allclose(found[group][name].double(), wanted, atol=1e-7)
        assert found[group][name].dtype == torch.float32
    assert found["empty"] == {}


def test_without_clients_it_is_noise_alone() -> None:
    normal = Seeded()
    found = release(level(normal=normal), [], W)[0]["adapter"]["w"]
    assert torch.allclose(found, C * normal.drawn[0] / 10, rtol=1e-12)


def test_an_event_is_noted_before_its_noise_is_drawn() -> None:
    checks.nothing_is_drawn_before_it_is_noted()


def test_an_event_says_what_was_done() -> None:
    events: list[Mapping[str, Any]] = []
    own = level(cohort=4, noise_multiplier=2.0)
    release(own, [], W, clients=["b", "a"], note=events.append)
    (event,) = events
    assert event == {
        "unit": "client",
        "neighbours": "add or remove one client's updates",
        "mechanism": "gaussian",
        "noise_multiplier": 2.0,
        "clip": C,
        "sampling_probability": 1.0,
        "clients": ["a", "b"],
        "epsilon": pytest.approx(accounting.gaussian_epsilon(0.5, DELTA)),
        "delta": DELTA,
    }
    assert json.loads(json.dumps(event)) == event


# --- a clip that adapts


def test_the_clip_follows_the_norms() -> None:
    checks.clip_follows_the_norms()


def test_the_clip_reaches_the_quantile_of_norms() -> None:
    """Lognormal ones; within the noise of its own count."""
    generator = torch.Generator().manual_seed(3)
    own = level(cohort=100, clip_quantile=0.3, normal=Seeded(1), clip=10.0)
    memory: Payload = {}
    clips = []
    for round in range(1, 61):
        norms = torch.randn(100, generator=generator, dtype=torch.float64).exp()
        updates = [({"adapter": {"w": torch.tensor([0, norm, 0])}}, 1.0) for norm in norms]
        _, memory, metrics = release(own, updates, W, memory=memory, round=round)
        clips.append(metrics["clip"])
    wanted = math.exp(-0.5244)  # the 0.3 quantile of N(0, 1)
    assert sum(clips[-20:]) / 20 == pytest.approx(wanted, rel=0.15)
    assert clips[0] == 10.0


def test_the_clip_of_a_round_is_that_from_before_it() -> None:
    """For the bound and for the noise: the next one follows from both."""
    normal = Seeded()
    own = level(cohort=4, clip_quantile=0.5, normal=normal)
    updates = [(filled(W, lambda t: torch.full_like(t, 9.0)), 1.0)] * 4
    found, memory, metrics = release(own, updates, W)
    z, sigma = 1.0, 1.0  # cohort / 20 would be less than z
    std = (z**-2 - (2 * sigma) ** -2) ** -0.5
    noise, count = normal.drawn
    direction = torch.full((3,), 3**-0.5, dtype=torch.float64)
    wanted = (4 * C * direction + std * C * noise) / 4
    assert torch.allclose(found["adapter"]["w"], wanted, rtol=1e-12)
    within = (4 * -0.5 + sigma * float(count)) / 4 + 0.5
    follows = C * math.exp(-0.2 * (within - 0.5))
    assert metrics["clipped"] == pytest.approx(1 - within)
    assert metrics["noise_std"] == pytest.approx(std * C / 4)
    summed = own.aggregator(registry.create("fedavg").aggregator, memory, W)
    assert summed.clip == pytest.approx(follows)


@pytest.mark.parametrize(("cohort", "sigma"), [(100, 5.0), (10, 1.0)])
def test_the_count_is_paid_from_the_same_budget(cohort: int, sigma: float) -> None:
    """Noise of both is one Gaussian mechanism of the noise multiplier that is accounted."""
    own = level(cohort=cohort, clip_quantile=0.5, normal=silent)
    metrics = release(own, [], W, clients=["a"])[2]
    of_updates = metrics["noise_std"] * cohort / C
    # What one client moves, in standard deviations: of the sum 1 / z, of the count (1/2) / sigma.
    mu = math.hypot(1 / of_updates, 0.5 / sigma)
    assert mu == pytest.approx(1.0)
    assert metrics["epsilon"] == pytest.approx(accounting.gaussian_epsilon(mu, DELTA))


def test_no_clip_is_remembered_that_was_not_asked_for() -> None:
    assert release(level(), [], W)[1] == {}


# --- correlated noise


def banded(rounds: int, separation: int, **changes: Any) -> ClientLevel:
    return level(
        **{"dp_mechanism": "banded", "rounds": rounds, "separation": separation, **changes}
    )


def test_correlated_noise_is_that_of_the_dense_matrix() -> None:
    """C⁻¹ z, with the memory of a server through its files after every round."""
    n, bands = 8, 3
    normal = Seeded()
    memory: Payload = {}
    found = []
    for round in range(1, n + 1):
        own = banded(n, bands, normal=normal)
        aggregate, after, _ = release(own, [], W, memory=memory, round=round)
        memory = codec.decode(codec.encode(after))
        found.append(aggregate["adapter"]["w"] * 10 / C)
    c = [1.0, 1 / 2, 3 / 8]
    rows = [[c[i - j] if 0 <= i - j < bands else 0.0 for j in range(n)] for i in range(n)]
    dense = torch.tensor(rows, dtype=torch.float64)
    wanted = torch.linalg.solve(dense, torch.stack(normal.drawn))
    assert torch.allclose(torch.stack(found), wanted, rtol=1e-12)


def test_correlated_noise_resumes_bit_for_bit() -> None:
    """A process that goes on from the files of another."""
    ends = []
    for stops in (False, True):
        own = banded(6, 3, normal=Seeded())
        memory: Payload = {}
        events: list[Mapping[str, Any]] = []
        for round in range(1, 7):
            if stops and round == 4:
                memory = codec.decode(codec.encode(memory))
                past, normal = [{**e, "round": t} for t, e in enumerate(events, 1)], own._normal
                own = banded(6, 3, past=past, normal=normal)
            updates = [(filled(W, lambda t: torch.full_like(t, 0.01)), 1.0)]
            aggregate, memory, metrics = release(
                own,
                updates,
                W,
                memory=memory,
                round=round,
                clients=[f"c{round % 3}"],
                note=events.append,
            )
        ends.append((aggregate["adapter"]["w"], metrics["epsilon"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("participations", [None, 1, 2])
def test_correlated_noise_keeps_the_budget(participations: int | None) -> None:
    """For the client that takes part as often as it may, over exactly the planned rounds."""
    own = banded(9, 4, epsilon=3.0, participations=participations, normal=silent)
    memory: Payload = {}
    for round in range(1, 10):
        assert own.next_epsilon(round) <= 3.0
        clients = own.able(["a"], round)
        _, memory, _ = release(own, [], W, memory=memory, round=round, clients=clients)
    assert own.guarantee().epsilon == pytest.approx(3.0, rel=1e-6)
    plan = client_plan(own.config, 1000, 10)
    assert plan[-1].epsilon == pytest.approx(3.0, rel=1e-6)


# --- what is accounted


@pytest.mark.parametrize(
    ("z", "k", "wanted"),
    [(1.0, 1, 4.8866), (2.0, 4, 4.8866), (4.0, 16, 4.8866), (8.0, 50, 4.2486), (0.8, 1, 6.3121)],
)
def test_rounds_of_one_client_are_one_gaussian_mechanism(z: float, k: int, wanted: float) -> None:
    own = level(noise_multiplier=z, delta=1e-6, rounds=k, normal=silent)
    for round in range(1, k + 1):
        release(own, [], W, round=round, clients=["a", f"other {round}"])
    assert own.guarantee().epsilon == pytest.approx(wanted, abs=6e-5)
    assert client_plan(own.config, 1000, 10)[-1].epsilon == pytest.approx(wanted, abs=6e-5)


def test_the_client_that_has_spent_most_counts() -> None:
    own = level(normal=silent)
    for round, clients in enumerate((["a", "b"], ["c"], ["a"]), 1):
        release(own, [], W, round=round, clients=clients)
    assert own.guarantee().epsilon == accounting.gaussian_epsilon(math.sqrt(2), DELTA)
    assert own.next_epsilon(4) == accounting.gaussian_epsilon(math.sqrt(3), DELTA)
    assert own.guarantee().epsilon == accounting.gaussian_epsilon(math.sqrt(2), DELTA)


def test_poisson_rounds_cost_everyone_alike_and_less() -> None:
    own = level(population=100, delta=1e-3, dp_sampling="poisson", normal=silent)
    for round in (1, 2):
        release(own, [], W, round=round, clients=["a"] if round == 1 else [])
    wanted = accounting.epsilon([Release(1.0, 0.1, 2)], 1e-3)
    assert own.guarantee().epsilon == wanted < accounting.gaussian_epsilon(1.0, 1e-3)
    assert own.next_epsilon(3) == accounting.epsilon([Release(1.0, 0.1, 3)], 1e-3)
    assert own.refusal("a", 3) == ""


@pytest.mark.parametrize("changes", [{}, {"dp_sampling": "poisson"}])
def test_a_budget_is_kept_to_the_end_and_not_beyond(changes: dict[str, Any]) -> None:
    own = level(population=200, delta=1e-3, epsilon=1.0, rounds=5, normal=silent, **changes)
    for round in range(1, 6):
        assert own.next_epsilon(round) <= 1.0
        release(own, [], W, round=round, clients=["a"])
    assert own.guarantee().epsilon == pytest.approx(1.0, rel=5e-3)
    assert own.next_epsilon(6) > 1.0


@pytest.mark.parametrize("dp_sampling", ["fixed", "poisson"])
def test_a_resumed_account_is_the_undisturbed_one_and_what_was_repeated(dp_sampling: str) -> None:
    """A round that was noted and not committed is noted once more: both count.

    Of Poisson sampling both have the same secret cohort, where two rounds would have one each.
    """
    given: dict[str, Any] = {"population": 100, "delta": 1e-3, "dp_sampling": dp_sampling}
    events: list[dict[str, Any]] = []
    noted: list[Mapping[str, Any]] = []

    def play(own: ClientLevel, rounds: Sequence[int]) -> None:
        for round in rounds:
            release(own, [], W, round=round, clients=["a"], note=noted.append)
            events.append({**noted[-1], "round": round, "attempt": 0})

    undisturbed = level(normal=silent, **given)
    play(undisturbed, [1, 2, 3])
    resumed = level(normal=silent, past=json.loads(json.dumps(events)), **given)
    assert resumed.guarantee() == undisturbed.guarantee()
    play(resumed, [3, 4])
    play(undisturbed, [4, 5])
    if dp_sampling == "fixed":
        assert resumed.guarantee().epsilon == undisturbed.guarantee().epsilon
        return
    z, q = resumed.noise_multiplier, resumed.sampling_probability
    wanted = accounting.epsilon([Release(z, q, 3), Release(z / math.sqrt(2), q)], 1e-3)
    assert resumed.guarantee().epsilon == pytest.approx(wanted, rel=1e-6)
    assert wanted > 1.1 * undisturbed.guarantee().epsilon
    assert resumed.next_epsilon(4) > resumed.next_epsilon(5)


def test_a_repeated_poisson_round_costs_what_its_densities_say() -> None:
    """Two looks at one secret draw, by integration: (1 - q) N(0, 1/2) + q N(1, 1/2) of a mean."""
    q, delta = 0.1, 1e-5
    own = level(population=100, cohort=10, dp_sampling="poisson", delta=delta, noise_multiplier=1.0)
    for _ in range(2):
        own.release(own.aggregator(WeightedMean, {}, W), [], {}, lambda event: None, round=1)
    y = torch.linspace(-12, 13, 2_000_001, dtype=torch.float64)
    std = math.sqrt(0.5)
    none, one = (torch.exp(-(((y - mean) / std) ** 2) / 2) / math.sqrt(math.pi) for mean in (0, 1))
    mixed = (1 - q) * none + q * one

    def excess(epsilon: float) -> float:
        over = [a - math.exp(epsilon) * b for a, b in ((mixed, none), (none, mixed))]
        return max(float(torch.trapezoid(d.clamp(min=0), y)) for d in over)

    told = own.guarantee().epsilon
    assert excess(told) <= delta * 1.01
    assert excess(told - 0.01) > delta


class _Shared(FedAvg):
    """Gives out one aggregator for all."""

    kept = WeightedMean()

    def aggregator(self) -> WeightedMean:
        return self.kept


class _Peeking(WeightedMean):
    """Remembers more than a sum."""


class _Odd(FedAvg):
    def aggregator(self) -> _Peeking:
        return _Peeking()


def test_aggregators_of_ones_own_are_looked_at() -> None:
    with pytest.raises(ConfigError, match="make a new one each time"):
        level().aggregator(_Shared().aggregator, {}, {"adapter": {"w": torch.zeros(3)}})
    assert "not one mean" in not_noised(_Odd())
    assert not not_noised(FedAvg())


def test_who_may_take_part() -> None:
    own = level(participations=2, separation=3, normal=silent)
    release(own, [], W, round=1, clients=["a", "b"])
    release(own, [], W, round=4, clients=["a"])
    assert own.able(["a", "b", "c"], 5) == ["b", "c"]
    assert own.able(["c", "b"], 2) == ["c"]
    assert "participations=2" in own.refusal("a", 9)
    assert "separation=3" in own.refusal("b", 3)


def test_cohorts_are_poisson() -> None:
    checks.cohorts_are_poisson()


def test_the_plan_of_a_run() -> None:
    """Never less than what the run spends, and evenly spaced."""
    given = config(rounds=57, participations=5, separation=2)
    plan = client_plan(given, 1000, 10)
    rounds = planned_rounds(57)
    assert len(plan) == len(rounds) == 20
    assert (rounds[0], rounds[-1]) == (3, 57)
    assert planned_rounds(3) == [1, 2, 3]
    for t, own in zip(rounds, plan, strict=True):
        k = min(5, math.ceil(t / 2))
        assert own.epsilon == pytest.approx(accounting.gaussian_epsilon(math.sqrt(k), DELTA))
        assert own.how.startswith(f"no amplification, each client in at most {k} round")
    assert all(a.epsilon <= b.epsilon for a, b in itertools.pairwise(plan))


def test_the_plan_with_poisson_sampling() -> None:
    plan = client_plan(config(rounds=3, dp_sampling="poisson", delta=1e-3), 100, 10)
    wanted = [accounting.epsilon([Release(1.0, 0.1, t)], 1e-3) for t in (1, 2, 3)]
    assert [own.epsilon for own in plan] == wanted
    assert plan[0].how == "Poisson sampling of clients, q = 0.1"


# --- examples


def test_batches_are_poisson() -> None:
    checks.batches_are_poisson()


def test_gradients_have_their_noise() -> None:
    checks.gradients_have_their_noise()


def test_a_step_is_noise_over_the_expected_batch() -> None:
    normal = Seeded()
    own = checks.examples(normal=normal)
    found = own.noised({"b": torch.zeros(2), "a": torch.ones(3, dtype=torch.float64)})
    a, b = normal.drawn  # in the order of names
    assert torch.equal(found["a"], (C * ((1 + 1.3 * a) / 10)).float())
    assert torch.equal(found["b"], (C * ((1.3 * b) / 10)).float())


def test_a_client_with_fewer_examples_than_a_batch_takes_all_of_them() -> None:
    own = checks.examples(examples=4, normal=silent)
    assert own.sampling_probability == 1
    assert own.draw() == [0, 1, 2, 3]
    assert own.noised({"w": torch.full((1,), 4.0)})["w"].tolist() == pytest.approx([C])


def test_draws_follow_the_chance_they_are_given() -> None:
    own = checks.examples(
        examples=4, batch=1, uniform=lambda n: torch.tensor([0.2, 0.25, 0.9, 0.0])
    )
    assert own.draw() == [0, 3]
    assert checks.examples(uniform=torch.ones).draw() == []


def test_what_a_client_spends_on_its_examples() -> None:
    own = checks.examples(budget=8.0)
    assert own.release == Release(1.3, 0.2, 4)
    found = own.guarantee(3)
    assert found.epsilon == accounting.epsilon([Release(1.3, 0.2, 12)], 1e-3)
    assert found.line() == (
        f"epsilon {found.epsilon:.4g} of a budget of 8 at delta 0.001, to add or remove one "
        f"example; Poisson sampling of examples, q = 0.2"
    )
    assert own.guarantee(0).epsilon == 0


def test_noise_for_a_budget_of_examples() -> None:
    """For all rounds that a client may train in; by epochs where steps are counted so."""
    given: dict[str, Any] = {"dp": "example", "batch_size": 10, "delta": 1e-3}
    whole = example_level(RunConfig(epsilon=5.0, rounds=6, local_steps=4, **given), examples=50)
    assert (whole.steps, whole.batch, whole.budget, whole.clip) == (4, 10, 5.0, 1.0)
    assert whole.guarantee(6).epsilon == pytest.approx(5.0, rel=5e-3)
    assert whole.guarantee(6).epsilon <= 5.0 < whole.guarantee(7).epsilon
    fewer = example_level(
        RunConfig(epsilon=5.0, rounds=6, participations=2, local_epochs=2, **given), 8
    )
    assert fewer.steps == 2  # one batch an epoch, which is not full
    assert fewer.guarantee(2).epsilon <= 5.0 < fewer.guarantee(3).epsilon
    stated = example_level(RunConfig(noise_multiplier=0.7, rounds=6, **given), 50)
    assert (stated.noise_multiplier, stated.budget) == (0.7, None)


# --- what is said, and refused


def test_a_guarantee_in_words_and_values() -> None:
    own = Guarantee(
        "client", 2.34567, 1e-5, None, "no amplification, each client in at most 1 round"
    )
    assert own.line() == (
        "epsilon 2.346 at delta 1e-05, to add or remove one client's updates; no amplification, "
        "each client in at most 1 round"
    )
    assert json.loads(json.dumps(own.to_json())) == {
        "unit": "client",
        "epsilon": 2.34567,
        "delta": 1e-5,
        "budget": None,
        "how": own.how,
    }
    endless = Guarantee("example", math.inf, 1e-5, 1.0, "")
    assert endless.to_json()["epsilon"] is None
    assert "epsilon inf of a budget of 1" in endless.line()


def test_how_a_guarantee_came_about() -> None:
    own = banded(4, 2, normal=silent)
    release(own, [], W, round=1, clients=["a"])
    wanted = "no amplification, each client in at most 1 round, noise correlated over 2 rounds"
    assert own.guarantee().how == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": None}, "found neither"),
        ({"epsilon": 1.0}, "found both"),
        ({"dp_sampling": "poisson", "participations": 2}, "leave out participations"),
        ({"dp_sampling": "poisson", "separation": 2}, "separation"),
        ({"dp_sampling": "poisson", "dp_mechanism": "banded"}, "or use dp-sampling=fixed"),
        ({"dp_mechanism": "banded", "clip_quantile": 0.5}, "leave out clip-quantile"),
        ({"delta": 0.01}, "delta=0.01 is no protection among 100 clients: set less than 0.01"),
    ],
)
def test_what_no_account_could_tell_the_truth_about(changes: dict[str, Any], message: str) -> None:
    """Also where the config let it pass."""
    with pytest.raises(ConfigError, match=message):
        ClientLevel(config().model_copy(update=changes), 100, 10)


def test_a_delta_that_would_allow_to_publish_an_example() -> None:
    given = config().model_copy(update={"dp": "example", "delta": 1e-2})
    with pytest.raises(ConfigError, match=r"training examples of a client: set less than 0\.01"):
        example_level(given, 100)
    assert isinstance(example_level(given, 99), ExampleLevel)
    with pytest.raises(ConfigError, match="needs training examples of a client to protect"):
        example_level(given, 0)


def test_nothing_of_it_follows_a_seed_of_the_run() -> None:
    """The defaults are the operating system's, in both levels."""
    assert ExampleLevel(1, 1, 1.0, 1.0, 0.1, 1).normal is randomness.os_normal
    assert ExampleLevel(1, 1, 1.0, 1.0, 0.1, 1).uniform is randomness.os_uniform
    assert level()._normal is randomness.os_normal
    assert level()._uniform is randomness.os_uniform


def test_large_tensors_get_their_noise_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values as in one piece, for every slice its own."""
    whole, sliced = (
        dataclasses.replace(checks.examples(), normal=_from(torch.Generator().manual_seed(7)))
        for _ in range(2)
    )
    sums = {"a": torch.ones(3, 5), "b": torch.tensor(2.0)}
    expected = whole.noised(sums)
    monkeypatch.setattr(randomness, "SLICE", 4)
    found = sliced.noised(sums)
    for name, tensor in sums.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])
    assert len(set(found["a"].flatten().tolist())) == 15


def _from(generator: torch.Generator) -> Normal:
    """Normal values one after another, whatever the shapes they are asked for in."""

    def draw(shape: Sequence[int]) -> torch.Tensor:
        values = [torch.randn((), generator=generator) for _ in range(math.prod(shape))]
        return torch.stack(values).double().reshape(tuple(shape))

    return draw


# --- what is said of the noise


@pytest.mark.parametrize("bands", [1, 2])
def test_the_norms_of_noise_and_mean_update_are_those_of_what_is_released(bands: int) -> None:
    like: Payload = {"adapter": {"w": torch.zeros(40_000)}}
    update: Payload = {"adapter": {"w": torch.full((40_000,), C / 200)}}  # of norm C
    changes: dict[str, Any] = {"noise_multiplier": 0.02, "normal": Seeded()}
    if bands > 1:
        changes |= {"dp_mechanism": "banded", "separation": bands}
    own = level(cohort=5, **changes)
    memory: Payload = {}
    for round in (1, 2):
        names = [f"c{round}{i}" for i in range(4)]  # one of five is silent
        released, memory, told = release(
            own, [(update, 1.0)] * 4, like, memory=memory, round=round, clients=names
        )
        noise = flat(released) - 4 / 5 * flat(update)
        assert told["noise_norm"] == pytest.approx(float(noise.norm()), rel=0.02)
        assert told["update_norm"] == pytest.approx(4 / 5 * C, rel=0.02)
    quiet = level(noise_multiplier=1e3, normal=silent)
    assert release(quiet, [(update, 1.0)], like)[2]["update_norm"] == 0.0  # never below nothing


def test_the_noise_of_a_round_of_gradients_is_that_which_is_drawn() -> None:
    own = ExampleLevel(100, 8, C, 2.0, DELTA, steps=25, normal=Seeded())
    drawn = sum(flat({"g": own.noised({"w": torch.zeros(10_000)})}) for _ in range(own.steps))
    assert isinstance(drawn, Tensor)
    assert own.noise_norm(10_000) == pytest.approx(float(drawn.norm()), rel=0.03)
    assert own.gradient_bound == 25 * C
    assert ExampleLevel(4, 8, C, 2.0, DELTA, 25).noise_norm(1) == pytest.approx(2 * C * 5 / 4)
