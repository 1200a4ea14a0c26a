import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor
from torch.func import functional_call

from corolla.client.training import zeroth_order
from corolla.client.training.zeroth_order import ZerothOrder, kernel
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.directions import signs
from corolla.directions.pools import GaussianPool, LowRankPool, SignPool
from corolla.directions.space import Beside, InPlace, Space
from corolla.errors import DataError, DivergedError
from corolla.evaluation import scoring
from corolla.models import pretrained, trainable
from corolla.models.full import FullModel
from corolla.models.lora import LoraModel
from corolla.models.trainable import Trainable
from corolla.types import Adapter, LoraSpec, Move, Params, Pool, Walk
from tests.client.training.dense import DATA, SPEC, padded, plain_loss

Settings = Callable[..., RunConfig]
SIGN = SignPool(64, (5, 1))
POOLS = [pytest.param(SIGN, id="sign"), pytest.param(GaussianPool(5), id="gaussian")]


def z(pool: Pool, k: int, count: int) -> Tensor:
    """One direction in fp64."""
    found = torch.zeros(count)
    pool.add(found, 0, [(k, 1.0)])
    return found.double()


class Recording:
    """A pool that writes down what is asked of it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.calls: list[tuple[int, list[tuple[int, float]], bool]] = []

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        self.calls.append((offset, list(terms), source is not None))
        self.pool.add(out, offset, terms, source)


class Quadratic:
    """L(w) = ½ wᵀ A w + b · w in fp64, with the interface of a resident model."""

    count = 40
    drifts = False

    def __init__(self, space: type[Beside] | type[InPlace] = Beside) -> None:
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(self.count, self.count, generator=generator, dtype=torch.float64)
        self.a = root @ root.T / self.count
        self.b = torch.randn(self.count, generator=generator, dtype=torch.float64)
        # Coarse numbers: what is added to them is exact in fp32.
        self.start = torch.randint(-64, 64, (self.count,), generator=generator) / 64.0
        self.w = self.start.clone()
        self.space = space
        self.base = SimpleNamespace(pad_id=0)
        self.device = torch.device("cpu")
        self.points: list[Tensor] = []

    def enter(self, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        self.w = start["w"].clone()
        return Beside(self.w) if self.space is Beside else InPlace([(0, self.w)])

    def read(self) -> Params:
        return {"w": self.w.clone()}

    def loss(self, w: Tensor) -> float:
        w = w.double()
        return float(w @ self.a @ w / 2 + self.b @ w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.a @ w.double() + self.b

    def walk(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: RunConfig,
        directions: Sequence[int],
        pool: Pool = SIGN,
        dtype: torch.dtype = torch.float32,
        change: Callable[[int, float], float] = lambda call, loss: loss,
        **fields: Any,
    ) -> Walk:
        """Train on it; `change` may replace the loss of a call."""
        calls = itertools.count()

        def loss(trainer: ZerothOrder, batch: Sequence[Encoded]) -> float:
            self.points.append(self.w.clone())
            return change(next(calls), self.loss(self.w))

        monkeypatch.setattr(ZerothOrder, "_loss", loss)
        values: dict[str, Any] = {"data": DATA, "seed": 0, "round": 1, **fields}
        made = ZerothOrder(cast(Trainable, self), SPEC, config=config, **values)
        return made.walk({"w": self.start}, (), pool, directions, dtype)


def trainer(
    model: Trainable,
    config: RunConfig,
    data: Sequence[Encoded] = DATA,
    seed: int = 0,
    round: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> ZerothOrder:
    return ZerothOrder(model, SPEC, data, config, seed, round, on_step)


def flat(params: Params) -> Tensor:
    return torch.cat([params[name].detach().double().reshape(-1) for name in sorted(params)])


def same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# The estimate


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("eps", [2.0**-6, 0.01])
def test_the_slope_of_a_quadratic_is_exact(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, pool: Pool, eps: float
) -> None:
    """Two-sided differences have no error on quadratics, at any point of the walk."""
    made = Quadratic()
    config = settings(eps=eps, lr=0.01, local_steps=12)
    directions = [(7 * t) % 64 for t in range(12)]
    walk = made.walk(monkeypatch, config, directions, pool)
    w = made.start.double()
    for g, k in zip(walk.scalars.tolist(), directions, strict=True):
        direction = z(pool, k, made.count)
        slope = float(made.gradient(w) @ direction)
        assert g == pytest.approx(slope, rel=1e-5, abs=1e-5 * float(made.gradient(w).norm()))
        w = w - 0.01 * g * direction
    assert float((walk.params["w"].double() - w).norm() / w.norm()) < 1e-6
    assert made.loss(walk.params["w"]) < made.loss(made.start)


@pytest.mark.parametrize("pool", POOLS)
def test_the_slope_is_that_of_autograd_up_to_the_square_of_eps(
    model: LoraModel,
    start: Params,
    plain: transformers.PreTrainedModel,
    settings: Settings,
    pool: Pool,
) -> None:
    leaves = {n: t.clone().requires_grad_() for n, t in start.items()}
    plain_loss(plain, leaves, DATA).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([cast(Tensor, leaves[n].grad).double().reshape(-1) for n in sorted(start)])
    slopes = torch.stack([gradient @ z(pool, k, len(gradient)) for k in range(8)])
    off = {}
    for eps in (0.04, 0.02, 0.005):
        config = settings(eps=eps, lr=1e-30, local_steps=8, batch_size=4)
        g = trainer(model, config).walk(start, (), pool, range(8)).scalars.double()
        off[eps] = float((g - slopes).norm() / slopes.norm())
    assert 2.5 < off[0.04] / off[0.02] < 6
    assert off[0.005] < min(0.01, off[0.02] / 8)


def test_the_slope_is_that_of_autograd_for_all_parameters(
    settings: Settings, plain: transformers.PreTrainedModel
) -> None:
    config = settings(
        strategy="seed_pool", parameters="full", eps=5e-3, lr=1e-30, local_steps=8, batch_size=4
    )
    full = trainable.build(config, pretrained.load(config))
    plain.requires_grad_(True)
    plain(**padded(DATA)).loss.backward()
    grads = {n: cast(Tensor, p.grad) for n, p in plain.named_parameters()}
    gradient = flat(grads)
    slopes = torch.stack([gradient @ z(SIGN, k, len(gradient)) for k in range(8)])
    g = trainer(full, config).walk({}, (), SIGN, range(8)).scalars.double()
    assert float((g - slopes).norm() / slopes.norm()) < 0.02


def test_the_loss_is_that_of_transformers(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    config = settings(eps=1e-6, lr=1e-30, local_steps=1, batch_size=4)
    walk = trainer(model, config).walk(start, (), SIGN, [0])
    wanted = float(plain_loss(plain, start, DATA))
    assert walk.metrics["train_loss"] == pytest.approx(wanted, rel=1e-5)
    assert walk.metrics["target_tokens"] == 3 + 7 + 1 + 4


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_of_unequal_targets_are_one_batch(
    model: LoraModel, start: Params, settings: Settings, micro: int
) -> None:
    given: dict[str, Any] = {"eps": 0.05, "lr": 1e-3, "local_steps": 3, "batch_size": 4}
    whole, parts = (settings(**given), settings(**given, micro_batch_size=micro))
    model.write(start, SPEC)
    losses = [trainer(model, config)._loss(DATA) for config in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    means = [trainer(model, whole)._loss([one]) for one in DATA]
    assert abs(sum(means) / 4 - losses[0]) > 1e-2  # what a mean of means would be
    walks = [trainer(model, config).walk(start, (), SIGN, range(3)) for config in (whole, parts)]
    tolerance = 2e-7 * losses[0] / 0.05  # of a loss in fp32, twice
    torch.testing.assert_close(walks[1].scalars, walks[0].scalars, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_is_computed_in_single_precision(
    settings: Settings, dtype: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    config = settings(dtype=dtype, local_steps=1, batch_size=4, eps=1e-6, lr=1e-30)
    model = LoraModel(pretrained.load(config))
    kinds = set()
    own = scoring.loss_sum

    def spy(*args: Any) -> Tensor:
        found = own(*args)
        kinds.add(found.dtype)
        return found

    monkeypatch.setattr(zeroth_order, "loss_sum", spy)
    found = trainer(model, config).walk(model.init(SPEC, 0), (), SIGN, [0])
    assert kinds == {torch.float32}
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=getattr(torch, dtype)
    )
    batch = padded(DATA)
    with torch.no_grad():
        logits = half(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found.metrics["train_loss"] == pytest.approx(float(wanted), rel=2e-3)


def test_eps_is_a_number_of_few_bits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown in place is taken away again: with few bits, both are rounded alike."""
    for eps, used in ((0.01, 0.010009765625), (1e-3, 0.00099945068359375), (0.25, 0.25)):
        pool = Recording(SIGN)
        walk = Quadratic().walk(monkeypatch, settings(eps=eps, local_steps=1), [3], pool)
        looked = [terms for _, [*terms], looks in pool.calls if looks and terms]
        assert looked == [[(3, used)], [(3, -used)]]
        made = Quadratic()
        slope = float(made.gradient(made.start) @ z(SIGN, 3, made.count))
        assert float(walk.scalars[0]) == pytest.approx(slope, rel=1e-4)  # divided by the same


# With a kernel


def moment(function: Callable[[float], float]) -> float:
    """E[function(r)] for r uniform in [-1, 1], by Gauss-Legendre quadrature: exact for these."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    return sum(w * function(float(r)) for r, w in zip(nodes, weights, strict=True)) / 2


def test_the_kernel_has_the_moments_that_remove_the_third_order() -> None:
    wanted = {"rK": 1.0, "r3K": 0.0, "rK2": 6.25, "K2": 18.75, "K": 0.0}
    found = {
        "rK": moment(lambda r: r * kernel(r)),
        "r3K": moment(lambda r: r**3 * kernel(r)),
        "rK2": moment(lambda r: (r * kernel(r)) ** 2),
        "K2": moment(lambda r: kernel(r) ** 2),
        "K": moment(kernel),
    }
    assert found == pytest.approx(wanted, abs=1e-12)


def test_the_kernel_estimate_of_a_cubic_has_no_bias() -> None:
    """L(t) = 2 t + 3 t² + 5 t³ has slope 2; a two-sided difference is 5 eps² off."""
    eps = 0.3

    def loss(t: float) -> float:
        return 2 * t + 3 * t**2 + 5 * t**3

    found = moment(lambda r: kernel(r) * (loss(r * eps) - loss(-r * eps)) / (2 * eps))
    assert found == pytest.approx(2, abs=1e-12)
    assert (loss(eps) - loss(-eps)) / (2 * eps) == pytest.approx(2 + 5 * eps**2)


@pytest.mark.parametrize("space", [Beside, InPlace])
def test_the_kernel_looks_at_random_distances(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, space: type[Beside] | type[InPlace]
) -> None:
    """For a quadratic each scalar is r K(r) times the slope, with r from the client's seed."""
    made, pool = Quadratic(space), Recording(SIGN)
    config = settings(estimator="kerzoo", eps=0.25, lr=1e-3, local_steps=6, queries=2)
    directions = [(7 * t) % 64 for t in range(12)]
    walk = made.walk(monkeypatch, config, directions, pool, seed=9)
    words = signs.words((9, 0), 0, 12, stream=3)
    drawn = [2 * ((int(word) >> 11) / 2**53) - 1 for word in words]
    assert min(drawn) < 0 < max(drawn)
    w = made.start.double()
    for step in range(6):
        gradient, moved = made.gradient(w), torch.zeros(made.count, dtype=torch.float64)
        for t in (2 * step, 2 * step + 1):
            direction, r = z(SIGN, directions[t], made.count), drawn[t]
            wanted = kernel(r) * r * float(gradient @ direction)
            assert float(walk.scalars[t]) == pytest.approx(wanted, rel=1e-4, abs=2e-4)
            moved += walk.step * float(walk.scalars[t]) * direction
        w = w + moved
    assert float((walk.params["w"].double() - w).norm() / w.norm()) < 1e-6
    if space is Beside:
        looked = [terms for _, [*terms], looks in pool.calls if looks and terms]
        pairs = zip(directions, drawn, strict=True)
        assert looked == [[(k, side * 0.25 * r)] for k, r in pairs for side in (1, -1)]


def test_distances_are_uniform_and_differ_from_client_to_client(
    settings: Settings, model: LoraModel
) -> None:
    config = settings(estimator="kerzoo", eps=1.0)
    drawn = [np.array(trainer(model, config, seed=s)._reach(20_000)[1])[:, 0] for s in (1, 2)]
    for found in drawn:
        assert -1 <= found.min() < -0.99 < 0.99 < found.max() < 1
        for power in (1, 2, 3, 4):
            exact = (1 / (power + 1)) if power % 2 == 0 else 0.0
            assert (found**power).mean() == pytest.approx(exact, abs=4 / math.sqrt(20_000))
    assert abs((drawn[0] * drawn[1]).mean()) < 4 / 3 / math.sqrt(20_000)


# The steps


@pytest.mark.parametrize("queries", [2, 3])
def test_several_queries_are_the_mean_of_each(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    """All of a step are measured at one point; the step is their mean."""
    made = Quadratic()
    chosen = [5, 9, 5][:queries]
    together = settings(queries=queries, local_steps=1, lr=0.02)
    alone = settings(queries=1, local_steps=1, lr=0.02)
    walk = made.walk(monkeypatch, together, chosen)
    singles = [made.walk(monkeypatch, alone, [k]) for k in chosen]
    assert walk.scalars.tolist() == [float(single.scalars[0]) for single in singles]
    assert walk.step == pytest.approx(-0.02 / queries, rel=1e-7)
    wanted = torch.stack([single.params["w"].double() for single in singles]).mean(0)
    assert float((walk.params["w"] - wanted).abs().max()) < 2e-7
    assert walk.metrics["scalars"] == queries
    assert trainer(cast(Trainable, made), together).queries == queries


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("space", [Beside, InPlace])
def test_the_trajectory_is_that_of_three_passes_a_step(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    space: type[Beside] | type[InPlace],
    pool: Pool,
) -> None:
    """MeZO as it is written: + eps z, - 2 eps z, + eps z, then - lr g z."""
    made = Quadratic(space)
    config = settings(eps=2.0**-4, lr=0.01, local_steps=40)
    directions = [(5 * t) % 16 for t in range(40)]
    walk = made.walk(monkeypatch, config, directions, pool)
    w = made.start.double()
    for k in directions:
        direction = z(pool, k, made.count)
        above = made.loss(w + 2.0**-4 * direction)
        below = made.loss(w - 2.0**-4 * direction)
        w = w - 0.01 * (above - below) / 2.0**-3 * direction
    assert float((walk.params["w"].double() - w).norm() / w.norm()) < 1e-6


def test_scalars_and_step_are_all_that_is_needed_to_follow(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded scalars move the weights: who receives them gets the same weights."""
    for dtype in (torch.float32, torch.float16):
        made = Quadratic()
        config = settings(lr=0.01, local_steps=20, queries=2)
        directions = [(3 * t) % 64 for t in range(40)]
        walk = made.walk(monkeypatch, config, directions, dtype=dtype)
        assert walk.scalars.dtype == dtype
        w = made.start.double()
        for g, k in zip(walk.scalars.tolist(), directions, strict=True):
            w = w + walk.step * g * z(SIGN, k, made.count)
        assert float((walk.params["w"] - w).norm() / w.norm()) < 1e-6


def low_rank(model: LoraModel, start: Params) -> Pool:
    return LowRankPool(5, tuple(tuple(start[n].shape) for n in sorted(start)), 2, 3)


@pytest.mark.parametrize("kind", ["sign", "gaussian", "low_rank"])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_update_is_along_the_perturbation_at_every_step(
    model: LoraModel, start: Params, settings: Settings, kind: str, queries: int
) -> None:
    pools: dict[str, Pool] = {"sign": SIGN, "gaussian": GaussianPool(5)}
    own = pools.get(kind) or low_rank(model, start)
    pool = Recording(own)
    count = len(flat(start))
    config = settings(lr=1e-3, local_steps=7, queries=queries, eps=2.0**-7)
    chosen = [(5 * t) % 64 for t in range(7 * queries)]
    walk = trainer(model, config).walk(start, (), pool, chosen)
    calls = [(dict(terms), looks) for _, terms, looks in pool.calls]
    per_step = 2 * queries + 1
    assert len(calls) == 7 * per_step + 1
    assert calls[-1] == ({}, True)
    for step in range(7):
        *looked, (moved, looks) = calls[step * per_step : (step + 1) * per_step]
        assert not looks
        assert all(looks for _, looks in looked)
        own_k = chosen[step * queries : (step + 1) * queries]
        assert [terms for terms, _ in looked] == [{k: s * 2.0**-7} for k in own_k for s in (1, -1)]
        own_g = walk.scalars[step * queries : (step + 1) * queries].tolist()
        assert moved == {k: walk.step * g for k, g in zip(own_k, own_g, strict=True)}
        if queries == 1:  # the vectors themselves
            ahead = torch.zeros(count)
            own.add(ahead, 0, list(looked[0][0].items()))
            update = torch.zeros(count)
            own.add(update, 0, list(moved.items()))
            cosine = torch.cosine_similarity(ahead.double(), update.double(), dim=0)
            assert abs(float(cosine)) == pytest.approx(1, abs=1e-6)
            assert (float(cosine) > 0) == (own_g[0] < 0)


def test_in_place_a_step_is_two_passes(settings: Settings) -> None:
    """The update of one step and the perturbation of the next are one pass over the weights."""
    config = settings(strategy="seed_pool", parameters="full", lr=1e-4, local_steps=5, eps=0.01)
    full = trainable.build(config, pretrained.load(config))
    tensors = len(list(full.model.parameters()))
    pool = Recording(SIGN)
    trainer(full, config).walk({}, (), pool, range(5))
    assert len(pool.calls) == tensors * (2 * 5 + 1)
    more = config.model_copy(update={"queries": 3, "local_steps": 2})
    pool.calls.clear()
    trainer(full, more).walk({}, (), pool, range(6))
    assert len(pool.calls) == tensors * (2 * 6 + 1)


def test_all_parameters_follow_three_passes_a_step(
    settings: Settings, plain: transformers.PreTrainedModel
) -> None:
    config = settings(
        strategy="seed_pool", parameters="full", lr=1e-3, local_steps=10, eps=2.0**-7, batch_size=4
    )
    full = trainable.build(config, pretrained.load(config))
    walk = trainer(full, config).walk({}, (), SIGN, range(10))
    assert walk.params == {}
    named = sorted(plain.named_parameters())
    w = flat(dict(named))

    def loss(point: Tensor) -> float:
        at, weights = 0, {}
        for name, tensor in named:
            weights[name] = point[at : at + tensor.numel()].float().view(tensor.shape)
            at += tensor.numel()
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        with torch.no_grad():
            return float(functional_call(plain, weights, kwargs=padded(DATA)).loss)

    eps = 2.0**-7
    spacing = 2.0**-21  # of float32 from 4 to 8, where the losses are: they are off by a few
    for k in range(10):
        direction = z(SIGN, k, len(w))
        high, low = loss(w + eps * direction), loss(w - eps * direction)
        assert 4 < min(high, low) < max(high, low) < 8
        slope = float(walk.scalars[k])
        assert slope == pytest.approx((high - low) / (2 * eps), abs=16 * spacing / (2 * eps))
        w = w - 1e-3 * slope * direction
    found = flat(dict(full.model.named_parameters()))
    assert float((found - w).norm() / w.norm()) < 1e-6


@pytest.mark.parametrize("pool", POOLS)
def test_walks_start_after_the_moves_given(
    model: LoraModel, start: Params, settings: Settings, pool: Pool
) -> None:
    g = torch.randn(64, generator=torch.Generator().manual_seed(2)) * 1e-3
    moved = flat(start)
    for k in range(64):
        moved = moved + float(g[k]) * z(pool, k, len(moved))
    config = settings(lr=1e-30, local_steps=2)
    walk = trainer(model, config).walk(start, [Move(pool, g)], pool, range(2))
    assert float((flat(walk.params) - moved).norm() / moved.norm()) < 1e-7


def test_lora_weights_are_exact_after_steps_that_are_undone(
    model: LoraModel, start: Params, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slopes of zero nothing moves, bit for bit, in the model itself."""
    monkeypatch.setattr(ZerothOrder, "_loss", lambda *_: 1.0)
    walk = trainer(model, settings(local_steps=50)).walk(start, (), SIGN, [3] * 50)
    assert not walk.scalars.any()
    assert walk.metrics["zero_scalars"] == 50.0
    assert same(walk.params, start)
    assert same(model.read(), start)


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        ("constant", 0.0, [1, 1, 1]),
        ("linear", 0.0, [5 / 6, 1 / 2, 1 / 6]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * t / 6)) / 2 for t in (1, 3, 5)]),
        ("constant", 1.0, [3 / 4, 1, 1]),
    ],
)
def test_the_rate_is_one_in_a_round_and_falls_across_rounds(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    warmup: float,
    rates: list[float],
) -> None:
    """It is that of the round's middle: of the third of four steps."""
    config = settings(
        schedule=kind, warmup_rounds=warmup, rounds=3, lr=0.012, local_steps=4, queries=2
    )
    for round, factor in enumerate(rates, 1):
        made, pool = Quadratic(), Recording(SIGN)
        walk = made.walk(monkeypatch, config, [1, 2] * 4, pool, round=round)
        assert walk.step == float(torch.tensor(walk.step))  # single precision: as it travels
        assert walk.step == schedule.step_size(config, round, len(DATA))  # what the server expects
        assert walk.step == pytest.approx(-0.012 * factor / 2, rel=1e-6)
        moved = [dict(terms) for _, terms, looks in pool.calls if not looks]
        g = walk.scalars.view(4, 2)
        assert moved == [{1: walk.step * float(a), 2: walk.step * float(b)} for a, b in g]


@pytest.mark.parametrize("space", ["lora", "full"])
def test_the_loss_falls(settings: Settings, space: str) -> None:
    rate = {"lora": 1e-2, "full": 3e-4}[space]
    config = settings(
        strategy="seed_pool", parameters=space, lr=rate, local_steps=200, batch_size=4
    )
    model = trainable.build(config, pretrained.load(config))
    first = model.init(SPEC, 0)
    made = trainer(model, config)
    model.enter(first, SPEC, ())
    before = made._loss(DATA)
    walk = made.walk(first, (), SignPool(512, (5, 1)), range(200))
    after = made._loss(DATA)
    assert after < before - 0.3
    assert after < walk.metrics["train_loss"] < before
    assert walk.metrics["local_steps"] == 200.0


# Half precision


def enters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on: how many moves each entry to a whole model had."""
    own, found = FullModel.enter, []

    def spy(model: FullModel, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        found.append(len(moves))
        return own(model, start, spec, moves)

    monkeypatch.setattr(FullModel, "enter", spy)
    return found


def all_of(model: FullModel) -> Params:
    return {n: p.detach().clone() for n, p in model.model.named_parameters()}


@pytest.mark.parametrize(("steps", "queries"), [(20, 1), (25, 1), (25, 2)])
def test_half_precision_steps_are_set_anew_from_their_scalars(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, steps: int, queries: int
) -> None:
    """After every tenth step the weights are those that all scalars so far give in one move."""
    config = settings(
        strategy="seed_pool",
        parameters="full",
        dtype="bfloat16",
        lr=1e-4,
        local_steps=steps,
        eps=2.0**-7,
        queries=queries,
    )
    full = trainable.build(config, pretrained.load(config))
    assert isinstance(full, FullModel)
    assert full.drifts
    before = [Move(SignPool(64, (5, 0)), torch.full((64,), 1e-3))]
    directions = [(7 * t) % 50 for t in range(steps * queries)]
    entered = enters(monkeypatch)
    walk = trainer(full, config).walk({}, before, SIGN, directions)
    found = all_of(full)
    assert entered == [1, 2, 2]
    sums = torch.zeros(64, dtype=torch.float64)
    for g, k in zip(walk.scalars.tolist(), directions, strict=True):
        sums[k] += g
    full.show(Adapter({}, moves=(*before, Move(SIGN, sums, walk.step))), SPEC)
    wanted = all_of(full)
    monkeypatch.setattr(zeroth_order, "_RESYNC", 1 << 30)
    trainer(full, config).walk({}, before, SIGN, directions)
    drifted = all_of(full)
    assert entered == [1, 2, 2, 1]
    assert not same(drifted, wanted)
    if steps == 20:
        assert same(found, wanted)
        return
    passes = 5 * 2 * queries + 1  # since the last time, each rounds once
    off = (flat(found) - flat(wanted)).abs()
    largest = torch.maximum(flat(found).abs(), flat(wanted).abs()) + queries * 2.0**-6
    assert bool((off <= (passes + 1) * 2.0**-8 * largest).all())
    assert float((flat(drifted) - flat(wanted)).norm()) > 1.5 * float(off.norm()) > 0


@pytest.mark.parametrize(
    ("dtype", "pool"), [("float32", SIGN), ("bfloat16", GaussianPool(5)), ("float16", SIGN)]
)
def test_only_signs_in_half_precision_are_set_anew(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dtype: str, pool: Pool
) -> None:
    """fp32 hardly drifts, and a move of Gaussian directions costs a pass for each."""
    config = settings(
        strategy="seed_pool", parameters="full", dtype=dtype, lr=1e-6, local_steps=12, eps=2.0**-7
    )
    full = trainable.build(config, pretrained.load(config))
    assert full.drifts == (dtype != "float32")
    entered = enters(monkeypatch)
    trainer(full, config).walk({}, (), pool, range(12))
    assert entered == ([0, 1] if dtype == "float16" else [0])


def test_factors_are_in_single_precision_whatever_the_base(settings: Settings) -> None:
    assert not LoraModel(pretrained.load(settings(dtype="bfloat16"))).drifts


# What is not finite


NAN = math.nan


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, bad: float, side: int
) -> None:
    made = Quadratic()
    config = settings(lr=0.01, local_steps=5)
    at = 2 * 3 + side
    walk = made.walk(
        monkeypatch, config, range(5), change=lambda call, loss: bad if call == at else loss
    )
    assert float(walk.scalars[3]) == 0.0
    assert int((walk.scalars == 0).sum()) == 1
    assert walk.metrics["skipped_scalars"] == 1.0
    assert walk.metrics["zero_scalars"] == 0.0
    assert math.isfinite(walk.metrics["train_loss"])
    w = made.start.double()
    for g, k in zip(walk.scalars.tolist(), range(5), strict=True):
        w = w + walk.step * g * z(SIGN, k, made.count)
    assert float((walk.params["w"] - w).norm() / w.norm()) < 1e-6


def test_of_several_queries_only_the_bad_one_is_skipped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(lr=0.01, local_steps=2, queries=3)
    made = Quadratic()
    walk = made.walk(
        monkeypatch, config, range(6), change=lambda call, loss: NAN if call == 3 else loss
    )
    assert walk.scalars.ne(0).tolist() == [True, False, True, True, True, True]
    assert walk.step == pytest.approx(-0.01 / 3, rel=1e-6)


@pytest.mark.parametrize(("bad", "diverges"), [(0, False), (2, False), (3, True), (4, True)])
def test_more_than_half_of_bad_scalars_end_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, bad: int, diverges: bool
) -> None:
    made = Quadratic()

    def run() -> Walk:
        return made.walk(
            monkeypatch,
            settings(lr=0.01, local_steps=4),
            range(4),
            change=lambda call, loss: NAN if call < 2 * bad else loss,
        )

    if diverges:
        with pytest.raises(DivergedError, match=f"{bad} of 4 scalars are not finite"):
            run()
    else:
        assert run().metrics["skipped_scalars"] == bad


def test_a_scalar_beyond_half_precision_is_skipped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(lr=0.01, local_steps=4, eps=2.0**-6)
    found = {}
    for dtype in (torch.float16, torch.float32):
        made = Quadratic()
        found[dtype] = made.walk(
            monkeypatch,
            config,
            range(4),
            dtype=dtype,
            change=lambda call, loss: 1e4 if call == 2 else loss,
        )
    half, single = found[torch.float16], found[torch.float32]
    assert float(single.scalars[1]) > 65504
    assert single.metrics["skipped_scalars"] == 0.0
    assert float(half.scalars[1]) == 0.0
    assert half.metrics["skipped_scalars"] == 1.0
    assert bool(half.scalars.isfinite().all())


@pytest.mark.parametrize("lr", [1e20, 1e38, 1e10])
def test_an_absurd_step_diverges(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    """Before it is taken: what is left are weights that a perturbation away are the start's."""
    made = Quadratic()
    usual = settings(local_steps=1, eps=2.0**-7, queries=2)
    config = usual.model_copy(update={"lr": lr})  # no range of settings lets it in

    def run() -> Walk:
        return made.walk(
            monkeypatch, config, [1, 2], change=lambda call, _: 1e9 if call == 0 else 0.0
        )

    if lr > 1e10:
        with pytest.raises(DivergedError, match=r"a step of -\d\.\de\+\d+: lower lr"):
            run()
        assert float((made.w - made.start).abs().max()) <= 2.0**-7
    else:
        assert bool(run().scalars.isfinite().all())


def test_weights_that_are_not_finite_diverge(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    name = "model.layers.0.mlp.up_proj.lora_A"  # attention may swallow a NaN
    poisoned = {**start, name: torch.full_like(start[name], NAN)}
    with pytest.raises(DivergedError, match="lower lr"):
        trainer(model, settings()).walk(poisoned, (), SIGN, range(2))
    wanted = trainer(model, settings()).walk(start, (), SIGN, range(2))
    again = trainer(model, settings()).walk(start, (), SIGN, range(2))
    assert torch.equal(wanted.scalars, again.scalars)  # no trace of the poison


def test_no_data_is_said(model: LoraModel, start: Params, settings: Settings) -> None:
    with pytest.raises(DataError, match="no example"):
        trainer(model, settings(), []).walk(start, (), SIGN, range(2))


# What is left alone


def test_nothing_is_kept_for_a_backward_pass(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    seen = []

    def look(module: Any, args: Any, output: Any) -> None:
        seen.append((torch.is_grad_enabled(), output.logits.requires_grad))
        assert not any(p.requires_grad for p in model.model.parameters())

    model.model.base_model.model.register_forward_hook(look)
    with torch.enable_grad():
        trainer(model, settings(local_steps=3)).walk(start, (), SIGN, range(3))
        assert torch.is_grad_enabled()
    assert seen == [(False, False)] * 6


def test_the_start_is_left_as_it_was(model: LoraModel, start: Params, settings: Settings) -> None:
    before = {n: t.clone() for n, t in start.items()}
    walk = trainer(model, settings(lr=0.1)).walk(start, (), SIGN, range(2))
    assert same(start, before)
    assert not same(walk.params, before)


def test_the_base_model_does_not_move(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    trainer(model, settings(lr=0.1)).walk(start, (), SIGN, range(2))
    own = model.detach().state_dict()
    assert same({n: own[n] for n in plain.state_dict()}, plain.state_dict())


def test_a_client_does_not_depend_on_the_one_before(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    wanted = trainer(model, settings(), DATA[:2]).walk(start, (), SIGN, range(2))
    trainer(model, settings(lr=0.5), DATA[2:], seed=9).walk(
        model.init(SPEC, 7), (), GaussianPool(3), range(2)
    )
    again = trainer(model, settings(), DATA[:2]).walk(start, (), SIGN, range(2))
    assert torch.equal(wanted.scalars, again.scalars)
    assert same(wanted.params, again.params)


def test_dropout_is_off(settings: Settings, start: Params) -> None:
    """A perturbation is measured on one function: with other units dropped on its two sides, the
    difference would be noise.
    """
    found = [
        trainer(LoraModel(pretrained.load(settings()), dropout=rate), settings()).walk(
            start, (), SIGN, range(2)
        )
        for rate in (0.0, 0.5)
    ]
    assert torch.equal(found[0].scalars, found[1].scalars)


@pytest.mark.parametrize("pool", POOLS)
def test_global_random_states_are_neither_read_nor_moved(
    model: LoraModel, start: Params, settings: Settings, pool: Pool
) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        results.append(trainer(model, settings()).walk(start, (), pool, range(2)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert torch.equal(results[0].scalars, results[1].scalars)
    assert same(results[0].params, results[1].params)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_order_of_data_is_that_of_first_order_training(
    model: LoraModel,
    start: Params,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
) -> None:
    """Neither pools nor directions nor queries change which examples come when."""
    config = settings(local_steps=9, batch_size=2, queries=queries)
    wanted = [[DATA[i] for i in batch] for batch in schedule.batches(config, 4, 11)]
    for pool in (SIGN, GaussianPool(4)):
        seen: list[Sequence[Encoded]] = []
        monkeypatch.setattr(
            ZerothOrder, "_loss", lambda own, batch, seen=seen: seen.append(batch) or 1.0
        )
        trainer(model, config, seed=11).walk(start, (), pool, [7] * 9 * queries)
        assert seen == [batch for batch in wanted for _ in range(2 * queries)]


# What is counted


def numbered() -> Iterator[Encoded]:
    for example, count in ((0, 3), (1, 1), (4, 2)):
        for _ in range(count):
            yield Encoded([40, 41, 42], [40, 41, 42], example)


@pytest.mark.parametrize(
    ("steps", "batch_size", "most"), [(1, 1, 1), (2, 3, 3), (6, 1, 3), (50, 2, 3)]
)
def test_examples_that_were_seen_count_once(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    batch_size: int,
    most: int,
) -> None:
    """Windows of one text are one example; a step that was skipped has seen its batch too."""
    data = list(numbered())
    config = settings(local_steps=steps, batch_size=batch_size)
    walk = Quadratic().walk(monkeypatch, config, range(steps), data=data, seed=3)
    batches = list(schedule.batches(config, len(data), 3))
    wanted = {data[i].example for batch in batches for i in batch}
    assert walk.num_examples == len(wanted) <= most
    plain = Quadratic().walk(monkeypatch, config, range(steps), data=DATA, seed=3)
    unnumbered = schedule.batches(config, len(DATA), 3)
    assert plain.num_examples == len({i for batch in unnumbered for i in batch})


@pytest.mark.parametrize("queries", [1, 4])
def test_every_forward_pass_counts_its_tokens(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    steps: list[int] = []
    config = settings(local_epochs=1, batch_size=4, queries=queries)
    walk = Quadratic().walk(monkeypatch, config, range(queries), on_step=steps.append)
    assert steps == [2 * queries * (4 + 8 + 4 + 6)]
    assert walk.metrics["target_tokens"] == 3 + 7 + 1 + 4  # of the data, however often it is read


def test_queries_are_those_of_all_steps(model: LoraModel, settings: Settings) -> None:
    assert trainer(model, settings(local_steps=7, queries=3)).queries == 21
    epochs = settings(local_epochs=2, batch_size=3, queries=2)
    assert trainer(model, epochs).queries == 2 * 2 * 2


def test_the_resident_model_of_all_parameters_is_set_anew_for_each_client(
    settings: Settings,
) -> None:
    config = settings(strategy="seed_pool", parameters="full", lr=1e-2, local_steps=3, eps=0.01)
    full = trainable.build(config, pretrained.load(config))
    assert isinstance(full, FullModel)
    wanted = trainer(full, config, DATA[:2]).walk({}, (), SIGN, range(3))
    trainer(full, config, DATA[2:]).walk({}, [Move(SIGN, torch.ones(64))], SIGN, range(3))
    again = trainer(full, config, DATA[:2]).walk({}, (), SIGN, range(3))
    assert torch.equal(wanted.scalars, again.scalars)
