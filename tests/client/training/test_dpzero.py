"""Zeroth-order training with privacy of each example, held against loops written by hand."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from corolla.client.training import padding
from corolla.client.training.zeroth_order import ZerothOrder, kernel
from corolla.config.run import RunConfig
from corolla.data import encoding
from corolla.data.encoding import Encoded
from corolla.directions.pools import GaussianPool, SignPool
from corolla.models import pretrained, trainable
from corolla.models.lora import LoraModel
from corolla.privacy.example_level import ExampleLevel
from corolla.types import Params, Pool, Walk
from tests.client.training.dense import SPEC, plain_loss

Settings = Callable[..., RunConfig]
SIGN = SignPool(64, (5, 1))
EPS = 0.0625  # exact in bf16
DATA = [
    Encoded([40, 41, 42, 43], [40, 41, 42, 43], 0),
    Encoded([50, 51, 52, 53, 54, 55, 56, 0], [50, 51, 52, 53, 54, 55, 56, 0], 1),
    Encoded([60, 61, 62, 0], [-100, -100, -100, 0], 2),
    # One example of two windows, which are clipped as one.
    Encoded([70, 71, 72, 73, 74, 0], [-100, -100, 72, 73, 74, 0], 3),
    Encoded([80, 81, 82], [80, 81, 82], 3),
    Encoded([90] * 40, [90] * 40, 4),
]
EXAMPLES = [[0], [1], [2], [3, 4], [5]]
"""Example → its sequences in DATA."""


def zeros(shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


def everybody(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def nobody(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64) - 2.0**-53


def level(**changes: Any) -> ExampleLevel:
    """Five examples, of which a step expects three; no noise and all drawn unless changed."""
    given: dict[str, Any] = {
        "examples": 5,
        "batch": 3,
        "clip": 1.0,
        "noise_multiplier": 2.0,
        "delta": 1e-5,
        "steps": 1,
        "normal": zeros,
        "uniform": everybody,
    }
    return ExampleLevel(**{**given, **changes})


class Drawn:
    """Normals and uniforms that are written down as they are drawn."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.normals: list[Tensor] = []
        self.uniforms: list[Tensor] = []

    def normal(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64)
        self.normals.append(drawn)
        return drawn

    def uniform(self, count: int) -> Tensor:
        drawn = torch.rand(count, generator=self._generator, dtype=torch.float64)
        self.uniforms.append(drawn)
        return drawn


def z(pool: Pool, k: int, start: Params) -> Params:
    """One direction, tensor by tensor in the order of names."""
    count = sum(t.numel() for t in start.values())
    values = torch.zeros(count)
    pool.add(values, 0, [(k, 1.0)])
    parts = torch.split(values, [start[n].numel() for n in sorted(start)])
    return {n: part.view_as(start[n]) for n, part in zip(sorted(start), parts, strict=True)}


def at(start: Params, direction: Params, scale: float) -> Params:
    return {n: t + scale * direction[n] for n, t in start.items()}


def own_loss(plain: transformers.PreTrainedModel, params: Params, example: int) -> float:
    """The mean loss over the targets of one example, window by window, by transformers."""
    total = targets = 0.0
    for sequence in (DATA[i] for i in EXAMPLES[example]):
        total += float(plain_loss(plain, params, [sequence])) * sequence.targets
        targets += sequence.targets
    return total / targets


def slope(
    plain: transformers.PreTrainedModel, params: Params, direction: Params, example: int
) -> float:
    above = own_loss(plain, at(params, direction, EPS), example)
    return (above - own_loss(plain, at(params, direction, -EPS), example)) / (2 * EPS)


def clipped(vector: Sequence[float], clip: float) -> list[float]:
    size = math.sqrt(sum(value * value for value in vector))
    return [value * min(1.0, clip / size) for value in vector]


@pytest.fixture
def config(settings: Settings) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        given: dict[str, Any] = {
            "strategy": "fedmezo",
            "dp": "example",
            "noise_multiplier": 2.0,
            "eps": EPS,
            "lr": 0.01,
            "local_steps": 1,
            "batch_size": 3,
        }
        return settings(**{**given, **changes})

    return make


@pytest.fixture
def model(config: Callable[..., RunConfig]) -> LoraModel:
    return LoraModel(pretrained.load(config()))


def walk(
    model: trainable.Trainable,
    config: RunConfig,
    start: Params,
    private: ExampleLevel,
    data: Sequence[Encoded] = DATA,
    pool: Pool = SIGN,
    **kwargs: Any,
) -> Walk:
    made = ZerothOrder(model, SPEC, data, config, 0, 1, private=private)
    return made.walk(start, (), pool, range(made.queries), **kwargs)


# What is computed


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("clip", [1e6, 1.0], ids=["loose", "tight"])
def test_without_noise_it_is_the_clipped_mean_of_each_examples_own_slopes(
    model: LoraModel,
    start: Params,
    plain: transformers.PreTrainedModel,
    config: Callable[..., RunConfig],
    queries: int,
    clip: float,
) -> None:
    """One joint clip of the queries of an example, and the expected batch as the denominator."""
    found = walk(model, config(queries=queries), start, level(clip=clip)).scalars
    directions = [z(SIGN, k, start) for k in range(queries)]
    wanted = [0.0] * queries
    for example in range(5):
        own = [slope(plain, start, direction, example) for direction in directions]
        assert math.sqrt(sum(g * g for g in own)) > 1.0  # or nothing would be clipped
        for query, g in enumerate(clipped(own, clip)):
            wanted[query] += g / 3
    assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=2e-4)


def test_five_noisy_steps_are_those_of_a_loop_by_hand(
    model: LoraModel,
    start: Params,
    plain: transformers.PreTrainedModel,
    config: Callable[..., RunConfig],
) -> None:
    """With the same normals and the same Poisson samples, one of which is empty."""
    drawn = Drawn(18)
    private = level(
        steps=5, batch=2, clip=2.0, noise_multiplier=0.7, normal=drawn.normal, uniform=drawn.uniform
    )
    given = config(queries=2, local_steps=5, batch_size=2, lr=0.004)
    found = walk(model, given, start, private)
    at_now, scalars = start, []
    sizes = []
    for step in range(5):
        batch = [i for i in range(5) if float(drawn.uniforms[step][i]) < 2 / 5]
        sizes.append(len(batch))
        directions = [z(SIGN, 2 * step + query, start) for query in range(2)]
        total = [0.0, 0.0]
        for example in batch:
            own = [slope(plain, at_now, direction, example) for direction in directions]
            total = [t + g for t, g in zip(total, clipped(own, 2.0), strict=True)]
        noise = drawn.normals[step].reshape(-1).tolist()
        measured = [(t + 0.7 * 2.0 * n) / 2 for t, n in zip(total, noise, strict=True)]
        for g, direction in zip(measured, directions, strict=True):
            at_now = at(at_now, direction, -0.004 / 2 * g)
        scalars += measured
    assert len(drawn.uniforms) == len(drawn.normals) == 5
    assert 0 in sizes
    assert max(sizes) > 1
    assert found.scalars.tolist() == pytest.approx(scalars, rel=1e-3, abs=5e-4)
    for name, tensor in found.params.items():
        torch.testing.assert_close(tensor, at_now[name], rtol=1e-5, atol=1e-5)


def test_kerzoo_is_clipped_after_its_factor(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """|K| is up to 7.5: clipped before it, an example could add 7.5 C."""
    losses = itertools.cycle([9.0, 0.0])
    monkeypatch.setattr(ZerothOrder, "_loss", lambda trainer, batch: next(losses))
    given = config(estimator="kerzoo", queries=1, local_steps=40)
    private = level(steps=40, examples=1, batch=1, clip=1.0)
    found = walk(model, given, start, private, DATA[:1]).scalars
    assert found.abs().max() <= 1.0
    assert (found.abs() > 0.999).sum() > 30
    assert max(abs(kernel(r / 100)) for r in range(-100, 101)) == pytest.approx(7.5)


@pytest.mark.parametrize("pool", [SIGN, GaussianPool(5)], ids=["sign", "gaussian"])
def test_half_precision_rounds_what_is_noised_already(
    model: LoraModel, start: Params, config: Callable[..., RunConfig], pool: Pool
) -> None:
    drawn = [Drawn(3), Drawn(3)]
    whole, half = (
        walk(model, config(), start, level(normal=d.normal), pool=pool, dtype=dtype).scalars
        for d, dtype in zip(drawn, (torch.float32, torch.float16), strict=True)
    )
    assert half.dtype == torch.float16
    assert torch.equal(half, whole.half())
    assert not torch.equal(half.float(), whole)


# Privacy


class Losses:
    """Losses by the first token of an example, and +, - in turn for its queries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slopes: dict[int, list[float]]) -> None:
        self.calls: list[int] = []
        turn: dict[int, Iterator[float]] = {
            token: itertools.cycle([value for g in own for value in (2 * EPS * g, 0.0)])
            for token, own in slopes.items()
        }

        def loss(trainer: ZerothOrder, batch: Sequence[Encoded]) -> float:
            token = batch[0].input_ids[0]
            self.calls.append(token)
            return next(turn[token])

        monkeypatch.setattr(ZerothOrder, "_loss", loss)


def sums(
    model: LoraModel, config: RunConfig, start: Params, data: Sequence[Encoded], **changes: Any
) -> Tensor:
    """The sum over all examples that the noise is put on."""
    count = len({sequence.example for sequence in data})
    found = walk(model, config, start, level(examples=count, batch=1, **changes), data)
    return found.scalars.double()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("estimator", ["two_sided", "kerzoo"])
@pytest.mark.parametrize("eps", [1e-4, EPS])
def test_no_example_moves_the_scalars_by_more_than_clip(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    queries: int,
    estimator: str,
    eps: float,
) -> None:
    """All leave-one-outs, at an eps so small that the rounding of a batch's losses would show."""
    clip = 0.5
    given = config(queries=queries, estimator=estimator, eps=eps, batch_size=1)
    whole = sums(model, given, start, DATA, clip=clip)
    moved = []
    for example in range(5):
        rest = [sequence for sequence in DATA if sequence.example != example]
        moved.append(float((whole - sums(model, given, start, rest, clip=clip)).norm()))
    assert max(moved) <= clip * (1 + 1e-5)
    assert max(moved) > 0.99 * clip  # the bound is met


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("wild", [1e30, -1e30, 1e308, math.inf, -math.inf, math.nan, 0.0])
def test_an_adversarial_example_moves_them_by_clip_at_most(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    wild: float,
) -> None:
    """What is not finite adds nothing at all, also in the other queries of its step."""
    tame = {40: [0.3] * queries, 50: [-5.0] * queries, 60: [2.0] * queries}
    data = [*DATA[:3], DATA[5]]
    given = config(queries=queries, batch_size=1)
    Losses(monkeypatch, tame)
    without = sums(model, given, start, data[:3])
    Losses(monkeypatch, {**tame, 90: [wild, *[1.0] * (queries - 1)]})
    moved = sums(model, given, start, data) - without
    assert bool(moved.isfinite().all())
    assert float(moved.norm()) <= 1 + 1e-5
    if not math.isfinite(wild):
        assert moved.tolist() == [0.0] * queries


def test_an_empty_draw_is_a_step_of_noise_and_no_pass(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = Losses(monkeypatch, {})
    drawn = Drawn(1)
    private = level(steps=2, clip=0.5, normal=drawn.normal, uniform=nobody)
    found = walk(model, config(queries=2, local_steps=2), start, private)
    assert losses.calls == []
    noise = torch.cat(drawn.normals).reshape(-1)
    assert found.scalars.tolist() == pytest.approx((2.0 * 0.5 * noise / 3).tolist(), rel=1e-6)
    moved = {n: (found.params[n] - start[n]).abs().max() for n in start}
    assert all(float(distance) > 0 for distance in moved.values())


@pytest.mark.parametrize("data", [[], [Encoded([40, 41], [-100, -100], 0)]], ids=["none", "masked"])
def test_a_client_without_a_target_sends_noise(
    model: LoraModel, start: Params, config: Callable[..., RunConfig], data: list[Encoded]
) -> None:
    """An error would tell of its examples."""
    drawn = Drawn(1)
    found = walk(model, config(), start, level(normal=drawn.normal), data)
    assert found.scalars.tolist() == pytest.approx((2.0 * drawn.normals[0] / 3).tolist())
    assert found.num_examples == 3


def test_the_noise_has_the_standard_deviation_that_was_paid_for(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the operating system, in 6000 scalars: each is off by 0.9 % of it at one sigma."""
    Losses(monkeypatch, {s.input_ids[0]: [0.0] for s in DATA})
    private = ExampleLevel(5, 3, 0.5, 2.0, 1e-5, 60)
    given = config(queries=100, local_steps=60, lr=1e-12)
    first, second = (walk(model, given, start, private).scalars for _ in range(2))
    wanted = 2.0 * 0.5 / 3
    assert float(first.std()) == pytest.approx(wanted, rel=0.06)
    assert abs(float(first.mean())) < 6 * wanted / math.sqrt(6000)
    assert not torch.equal(first, second)  # of no seed
    together = torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]
    assert abs(float(together)) < 0.08


def test_who_is_in_a_step_is_drawn_by_independent_coins(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes of batches vary as Poisson sampling makes them, from the operating system's chance."""
    losses = Losses(monkeypatch, {s.input_ids[0]: [0.0] for s in DATA})
    steps: list[int] = []

    def on_step(tokens: int) -> None:
        steps.append(len(losses.calls) // 2)
        losses.calls.clear()

    private = ExampleLevel(5, 3, 1.0, 2.0, 1e-5, 1000)
    given = config(local_steps=1000, lr=1e-12)
    ZerothOrder(model, SPEC, DATA, given, 0, 1, on_step, private).walk(start, (), SIGN, [0] * 1000)
    sizes = torch.tensor(steps, dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(3.0, abs=6 * math.sqrt(1.2 / 1000))
    assert float(sizes.var()) == pytest.approx(5 * 0.6 * 0.4, rel=0.27)  # 6 sigma
    assert set(steps) == {0, 1, 2, 3, 4, 5}


# What it says, and what it costs


def test_nothing_but_public_numbers_is_told(
    model: LoraModel, start: Params, config: Callable[..., RunConfig]
) -> None:
    """The same whatever was drawn."""
    for uniform in (everybody, nobody):
        found = walk(model, config(local_steps=4), start, level(steps=4, uniform=uniform))
        assert found.metrics == {"local_steps": 4.0}
        assert found.num_examples == 5  # min(examples, steps · batch)
    assert walk(model, config(), start, level()).num_examples == 3


def test_scalars_that_do_not_fit_half_precision_are_told_to_the_owner_alone(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is an answer whatever is measured."""
    loud = level(normal=lambda shape: zeros(shape) + 1e6)
    with caplog.at_level(logging.WARNING, "corolla"):
        found = walk(model, config(), start, loud, dtype=torch.float16)
    assert found.scalars.tolist() == [0.0]
    whys = [getattr(record, "facts", {})["why"] for record in caplog.records]
    assert whys == ["1 of 1 scalars are not finite in torch.float16: lower lr or raise eps"]


def test_a_step_that_is_none_is_left_out(
    model: LoraModel, start: Params, config: Callable[..., RunConfig]
) -> None:
    """Without privacy it is an error; here the next step goes on from the same point."""
    given = config(local_steps=2, queries=2, lr=1e6)
    wild = level(steps=2, normal=lambda shape: zeros(shape) + 1e30)
    found = walk(model, given, start, wild)
    assert found.scalars.tolist() == [0.0] * 4
    for name, tensor in found.params.items():
        assert torch.equal(tensor, start[name])


def test_an_example_that_fails_adds_nothing(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
) -> None:
    """Longer than was planned for: as if it were not there."""
    data = [*DATA[:5], Encoded([90] * 400, [90] * 400, 4)]
    without = walk(model, config(), start, level(), DATA[:5])
    found = walk(model, config(), start, level(), data)
    assert torch.equal(found.scalars, without.scalars)
    assert bool(found.scalars.abs() > 0)


@pytest.mark.parametrize("micro", [1, 2, None])
def test_examples_go_through_the_model_one_by_one(
    model: LoraModel,
    start: Params,
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    micro: int | None,
) -> None:
    """Windows of one together, as far as a micro-batch allows; bits do not depend on it."""
    seen: list[list[int]] = []
    real = encoding.collate

    def spy(part: Sequence[Encoded], *rest: Any) -> dict[str, Tensor]:
        seen.append([DATA.index(sequence) for sequence in part])
        return real(part, *rest)

    monkeypatch.setattr(padding, "collate", spy)
    walk(model, config(micro_batch_size=micro), start, level())
    windows = [[3], [4]] if micro == 1 else [[3, 4]]
    assert seen == 2 * [[0], [1], [2], *windows, [5]]


def test_all_parameters_are_trained_alike(config: Callable[..., RunConfig]) -> None:
    """In place: five steps of the same noise as on a copy made by hand."""
    given = config(strategy="seed_pool", parameters="full", local_steps=5, lr=1e-3)
    full = trainable.build(given, pretrained.load(given))
    before: Params = {n: p.detach().clone() for n, p in full.model.named_parameters()}
    drawn = Drawn(4)
    private = level(steps=5, normal=drawn.normal, uniform=nobody)
    found = walk(full, given, {}, private)
    assert found.params == {}
    for step, noise in enumerate(drawn.normals):
        direction = z(SIGN, step, before)
        before = at(before, direction, -1e-3 * float(2.0 * noise / 3))
    for name, parameter in full.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=1e-5, atol=1e-6)
