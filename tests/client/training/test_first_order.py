import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from corolla.client.training.first_order import FirstOrder
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.errors import DataError, DivergedError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import LoraSpec, Params
from tests.client.training.dense import DATA, SCALING, SPEC, plain_loss

Settings = Callable[..., RunConfig]


def trainer(
    model: LoraModel,
    data: Sequence[Encoded],
    config: RunConfig,
    seed: int = 0,
    round: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> FirstOrder:
    return FirstOrder(model, SPEC, data, config, seed, round, on_step)


def plain_gradients(
    plain: transformers.PreTrainedModel, params: Params, data: Sequence[Encoded]
) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
    plain_loss(plain, leaves, data).backward()  # type: ignore[no-untyped-call]
    return {n: t.grad for n, t in leaves.items() if t.grad is not None}


def assert_close(found: Params, wanted: Params, tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


def assert_equal(found: Params, wanted: Params) -> None:
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


def differs(one: Params, other: Params) -> bool:
    return any(not torch.equal(one[n], other[n]) for n in one)


def tree_copy(params: Params) -> Params:
    return {n: t.clone() for n, t in params.items()}


def constant(value: float) -> Callable[[Params, Params], Params]:
    """A hook that replaces every gradient by a constant."""
    return lambda gradients, weights: {n: torch.full_like(g, value) for n, g in gradients.items()}


def test_one_sgd_step_is_the_gradient_step_of_autograd(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, batch_size=4, clip_norm=None)
    gradients = plain_gradients(plain, start, DATA)
    assert all(float(g.abs().max()) > 1e-4 for g in gradients.values())
    found = trainer(model, DATA, config).fit(start).params
    assert_close(found, {n: start[n] - 0.5 * gradients[n] for n in start})


def test_one_adamw_step_is_the_formula(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    config = settings(lr=0.01, local_steps=1, batch_size=4, clip_norm=None, weight_decay=0.1)
    # The first step of Adam has both moments corrected to g and g².
    gradients = {n: g.double() for n, g in plain_gradients(plain, start, DATA).items()}
    wanted = {
        n: (t.double() * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)).float()
        for n, t in start.items()
        for g in [gradients[n]]
    }
    found = trainer(model, DATA, config).fit(start).params
    clear = {n: gradients[n].abs() > 1e-6 for n in wanted}  # else rounding decides the sign
    assert_close({n: found[n][clear[n]] for n in wanted}, {n: wanted[n][clear[n]] for n in wanted})


def test_the_loss_is_that_of_transformers(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    fit = trainer(model, DATA, settings(local_steps=1, batch_size=4)).fit(start)
    wanted = float(plain_loss(plain, start, DATA))
    assert fit.metrics["train_loss"] == pytest.approx(wanted, rel=1e-6)
    assert fit.metrics["target_tokens"] == 3 + 7 + 1 + 4


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulated_micro_batches_are_one_big_batch(
    model: LoraModel, start: Params, settings: Settings, micro: int
) -> None:
    config: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "local_steps": 3, "batch_size": 4}
    whole = trainer(model, DATA, settings(**config)).fit(start)
    parts = trainer(model, DATA, settings(**config, micro_batch_size=micro)).fit(start)
    assert_close(parts.params, whole.params)
    assert parts.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)


def test_a_mean_of_micro_batch_means_would_be_another_objective(
    plain: transformers.PreTrainedModel, start: Params
) -> None:
    """The probe above can see the difference that it is there for."""
    means = [float(plain_loss(plain, start, [one])) for one in DATA]
    assert abs(float(plain_loss(plain, start, DATA)) - sum(means) / 4) > 1e-2


def test_masked_labels_are_not_learnt(model: LoraModel, start: Params, settings: Settings) -> None:
    """What stands in masked positions of `labels` or in padding changes nothing."""
    config = settings(local_steps=1, batch_size=2)
    prompt = Encoded([60, 61, 62, 0], [-100, -100, 62, 0])
    first = Encoded(prompt.input_ids, [60, -100, 62, 0])  # position 0 predicts nothing
    longer = Encoded(range(80, 90), range(80, 90))
    one = trainer(model, [prompt, longer], config).fit(start)
    other = trainer(model, [first, longer], config).fit(start)
    assert_equal(other.params, one.params)
    assert one.metrics["target_tokens"] == 2 + 9


def test_padding_is_seen_by_nobody(settings: Settings, model: LoraModel, start: Params) -> None:
    config = settings(local_steps=1, batch_size=4)
    wanted = trainer(model, DATA, config).fit(start).params
    other = pretrained.load(config)
    other.tokenizer.pad_token = other.tokenizer.eos_token
    assert other.pad_id == 0
    assert_equal(trainer(LoraModel(other), DATA, config).fit(start).params, wanted)


def lengths(config: RunConfig, model: LoraModel, start: Params, seed: int) -> list[int]:
    """The order of the examples, told apart by their lengths."""
    data = [Encoded([40] * n, [40] * n) for n in range(2, 12)]
    seen: list[int] = []
    trainer(model, data, config, seed, on_step=seen.append).fit(start)
    return seen


def test_order_depends_on_the_seed_alone(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = settings(local_steps=20, batch_size=1)
    first = lengths(config, model, start, seed=5)
    assert first == lengths(config, model, start, seed=5)
    assert first != lengths(config, model, start, seed=6)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(2, 12))
    assert first[:10] != first[10:]


def test_epochs_see_every_example_equally_often(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    seen: list[int] = []
    data = [Encoded([40] * n, [40] * n) for n in (2, 3, 5, 9, 17)]
    fit = trainer(model, data, settings(local_epochs=2, batch_size=2), on_step=seen.append).fit(
        start
    )
    assert fit.metrics["local_steps"] == len(seen) == 2 * 3
    assert sum(seen) == 2 * (2 + 3 + 5 + 9 + 17)
    assert fit.num_examples == 5


@pytest.mark.parametrize(
    ("steps", "size", "distinct"), [(1, 1, 1), (1, 3, 3), (1, 50, 4), (2, 2, 4), (9, 2, 4)]
)
def test_examples_are_counted_once(
    model: LoraModel, start: Params, settings: Settings, steps: int, size: int, distinct: int
) -> None:
    fit = trainer(model, DATA, settings(local_steps=steps, batch_size=size)).fit(start)
    assert fit.num_examples == distinct


def rates(model: LoraModel, start: Params, config: RunConfig, rounds: Sequence[int]) -> list[float]:
    """The factors of lr: with a gradient of one, what every step of SGD subtracts."""
    name = next(n for n in start if n.endswith("lora_B"))
    found: list[float] = []
    for round in rounds:
        values: list[float] = []

        def ones(gradients: Params, weights: Params, values: list[float] = values) -> Params:
            values.append(float(weights[name][0, 0]))
            return {n: torch.ones_like(g) for n, g in gradients.items()}

        fit = trainer(model, DATA, config, round=round).fit(
            {n: torch.zeros_like(t) for n, t in start.items()}, correct=ones
        )
        values.append(float(fit.params[name][0, 0]))
        found += [(a - b) / config.lr for a, b in itertools.pairwise(values)]
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "rounds", "wanted"),
    [
        ("constant", 0.0, 2, 2, [1, 1, 1, 1]),
        ("linear", 0.0, 2, 3, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 0.0, 2, 3, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("constant", 1.0, 4, 2, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", 1.0, 4, 2, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.5, 4, 1, [0.5, 1, 1, 0.5]),
    ],
)
def test_learning_rate_runs_across_rounds(
    model: LoraModel,
    start: Params,
    settings: Settings,
    schedule: str,
    warmup: float,
    steps: int,
    rounds: int,
    wanted: list[float],
) -> None:
    config = settings(
        optimizer="sgd",
        lr=0.125,
        clip_norm=None,
        schedule=schedule,
        warmup_rounds=warmup,
        local_steps=steps,
        rounds=rounds,
    )
    assert rates(model, start, config, range(1, rounds + 1)) == pytest.approx(wanted, abs=1e-5)


def test_the_joint_norm_is_clipped_after_the_hook(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, clip_norm=0.25)
    values = sum(t.numel() for t in start.values())
    found = trainer(model, DATA, config).fit(start, correct=constant(3.0)).params
    moved = 0.5 * 0.25 / math.sqrt(values)  # every entry has an equal share of the norm
    assert_close(found, {n: t - moved for n, t in start.items()})


def test_a_small_gradient_is_not_clipped(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, clip_norm=1e3)
    found = trainer(model, DATA, config).fit(start, correct=constant(0.5)).params
    assert_close(found, {n: t - 0.25 for n, t in start.items()})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_shrinks_by_lr_times_decay(
    model: LoraModel, start: Params, settings: Settings, optimizer: str
) -> None:
    config = settings(optimizer=optimizer, lr=0.5, weight_decay=0.2, local_steps=2)
    found = trainer(model, DATA, config).fit(start, correct=constant(0.0)).params
    assert_close(found, {n: t * 0.9**2 for n, t in start.items()})


def test_a_proximal_term_alone_follows_its_closed_form(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    """g = mu (w - c) gives w_k = c + (1 - lr mu)^k (w_0 - c)."""
    config = settings(optimizer="sgd", lr=0.5, local_steps=3, clip_norm=None)

    def proximal(gradients: Params, weights: Params) -> Params:
        return {n: 0.8 * (weights[n] - 1.0) for n in gradients}

    found = trainer(model, DATA, config).fit(start, correct=proximal).params
    assert_close(found, {n: 1.0 + (1 - 0.5 * 0.8) ** 3 * (t - 1.0) for n, t in start.items()})


def test_the_hook_sees_gradients_and_weights(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, batch_size=4, clip_norm=None)
    seen: list[tuple[Params, Params]] = []

    def look(gradients: Params, weights: Params) -> Params:
        seen.append((tree_copy(gradients), tree_copy(weights)))
        return {n: g + 0.1 * (weights[n] - start[n] + 1) for n, g in gradients.items()}

    found = trainer(model, DATA, config).fit(start, correct=look).params
    gradients = plain_gradients(plain, start, DATA)
    assert_equal(seen[0][1], dict(sorted(start.items())))
    assert_close(seen[0][0], gradients)
    assert_close(found, {n: start[n] - 0.5 * (gradients[n] + 0.1) for n in start})


def test_only_selected_tensors_move(model: LoraModel, start: Params, settings: Settings) -> None:
    config = settings(lr=0.1, weight_decay=0.5)
    found = trainer(model, DATA, config).fit(start, train=lambda n: n.endswith("lora_B")).params
    moved = {n for n in start if not torch.equal(found[n], start[n])}
    assert moved == {n for n in start if n.endswith("lora_B")}


def test_the_base_model_does_not_move(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    trainer(model, DATA, settings(lr=0.1)).fit(start)
    own = model.detach().state_dict()
    assert_equal({n: own[n] for n in plain.state_dict()}, plain.state_dict())


def test_frozen_blocks_join_the_base_model(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    """Their effect on the loss is that of their dense product, with scaling one."""
    blocks = [{n: t * 0.5 for n, t in start.items()}, {n: t * 0.25 for n, t in start.items()}]
    fit = trainer(model, DATA, settings(local_steps=1, batch_size=4)).fit(start, frozen=blocks)
    # s B A + (B/2)(A/2) + (B/4)(A/4) = (s + 5/16) B A; half of it more than s in A alone
    dense = {n: t * (1 + 5 / 16 / SCALING) if n.endswith("A") else t for n, t in start.items()}
    assert fit.metrics["train_loss"] == pytest.approx(
        float(plain_loss(plain, dense, DATA)), rel=1e-6
    )


@pytest.mark.parametrize("strength", [0.25, 2.0])
def test_strength_multiplies_the_product_in_loss_and_gradient(
    model: LoraModel,
    start: Params,
    plain: transformers.PreTrainedModel,
    settings: Settings,
    strength: float,
) -> None:
    """W + strength · s B A; what is trained is A and B as they are."""
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, batch_size=4, clip_norm=None)
    leaves = {n: t.clone().requires_grad_() for n, t in start.items()}
    scaled = {n: strength * t if n.endswith("lora_A") else t for n, t in leaves.items()}
    loss = plain_loss(plain, scaled, DATA)
    loss.backward()  # type: ignore[no-untyped-call]
    fit = trainer(model, DATA, config).fit(start, strength=strength)
    assert fit.metrics["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    wanted = {n: (t - 0.5 * t.grad).detach() for n, t in leaves.items() if t.grad is not None}
    assert_close(fit.params, wanted)


@pytest.mark.parametrize(
    ("schedule", "wanted"), [("constant", 1.5), ("linear", 0.5 * (1 + 5 / 6 + 4 / 6))]
)
def test_distance_is_the_sum_of_the_rates_that_steps_were_made_with(
    model: LoraModel, start: Params, settings: Settings, schedule: str, wanted: float
) -> None:
    """With SGD, (start - params) / distance is the mean gradient."""
    options = {"optimizer": "sgd", "lr": 0.5, "clip_norm": None, "schedule": schedule}
    config = settings(**options, local_steps=3, rounds=2)
    fit = trainer(model, DATA, config).fit(start, correct=constant(0.25))
    assert fit.distance == pytest.approx(wanted, rel=1e-9)
    mean = {n: (t - fit.params[n]) / fit.distance for n, t in start.items()}
    assert_close(mean, {n: torch.full_like(t, 0.25) for n, t in start.items()}, 1e-5)


# Cores R between B and A


@pytest.fixture
def cores(start: Params) -> Params:
    noise = torch.Generator().manual_seed(2)
    names = [n.replace("lora_A", "lora_R") for n in start if n.endswith("lora_A")]
    return {n: torch.randn(2, 2, generator=noise) for n in names}


def core_steps(
    plain: transformers.PreTrainedModel, leaves: dict[str, Tensor], fixed: Params, steps: int
) -> None:
    """Full-batch SGD on the leaves, by autograd through W + s B R A of a plain model."""
    optimizer = torch.optim.SGD(leaves.values(), lr=0.2)
    for _ in range(steps):
        whole = {**fixed, **leaves}
        product = {
            n: whole[n.replace("lora_A", "lora_R")] @ t if n.endswith("lora_A") else t
            for n, t in whole.items()
            if not n.endswith("lora_R")
        }
        optimizer.zero_grad()
        plain_loss(plain, product, DATA).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("with_b", [False, True])
def test_cores_follow_their_gradient_by_autograd_and_a_never_moves(
    model: LoraModel,
    start: Params,
    cores: Params,
    plain: transformers.PreTrainedModel,
    settings: Settings,
    with_b: bool,
) -> None:
    config = settings(optimizer="sgd", lr=0.2, local_steps=3, batch_size=4, clip_norm=None)
    fit = trainer(model, DATA, config).fit(
        {**start, **cores}, train=lambda n: with_b or not n.endswith("lora_B")
    )
    moving = {n: t for n, t in start.items() if with_b and n.endswith("lora_B")} | dict(cores)
    leaves = {n: t.clone().requires_grad_() for n, t in moving.items()}
    core_steps(plain, leaves, start, 3)
    assert fit.params.keys() == start.keys() | cores.keys()
    assert_close(
        {n: fit.params[n] for n in leaves}, {n: t.detach() for n, t in leaves.items()}, 1e-5
    )
    assert_equal({n: fit.params[n] for n in start if n not in leaves},
                 {n: t for n, t in start.items() if n not in leaves})  # fmt: skip
    assert all(differs({n: fit.params[n]}, {n: t}) for n, t in cores.items())


def test_the_model_computes_with_the_core(
    model: LoraModel, start: Params, cores: Params, settings: Settings
) -> None:
    """While it trains, and afterwards: what stands in the place of A is R A."""
    fit = trainer(model, DATA, settings(local_steps=2)).fit(
        {**start, **cores}, train=lambda n: not n.endswith("lora_B")
    )
    held = model.read()
    for name, core in cores.items():
        a = name.replace("lora_R", "lora_A")
        assert_close({a: held[a]}, {a: fit.params[name] @ start[a]})
        assert differs({name: fit.params[name]}, {name: core})


def test_hook_and_clipping_see_cores_and_not_the_product(
    model: LoraModel, start: Params, cores: Params, settings: Settings
) -> None:
    config = settings(optimizer="sgd", lr=0.5, local_steps=1, clip_norm=0.25)
    seen: list[Params] = []

    def ones(gradients: Params, weights: Params) -> Params:
        seen.append(tree_copy(weights))
        return {n: torch.ones_like(g) for n, g in gradients.items()}

    fit = trainer(model, DATA, config).fit(
        {**start, **cores}, train=lambda n: not n.endswith("lora_B"), correct=ones
    )
    assert_equal(seen[0], cores)
    values = sum(t.numel() for t in cores.values())
    moved = 0.5 * 0.25 / math.sqrt(values)
    assert_close({n: fit.params[n] for n in cores}, {n: t - moved for n, t in cores.items()})


def test_a_start_that_misses_a_tensor_is_refused(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    for missing in start:
        with pytest.raises(ValueError, match="1 tensors"):
            trainer(model, DATA, settings()).fit({n: t for n, t in start.items() if n != missing})
    with pytest.raises(ValueError, match="1 tensors"):
        trainer(model, DATA, settings()).fit({**start, "stranger": torch.zeros(1)})


def test_a_start_of_another_rank_is_refused(model: LoraModel, settings: Settings) -> None:
    with pytest.raises(ValueError, match="rank 2"):
        trainer(model, DATA, settings()).fit(model.init(LoraSpec(3, 4.0), 0))


def test_no_data_is_said(model: LoraModel, start: Params, settings: Settings) -> None:
    with pytest.raises(DataError, match="no example"):
        trainer(model, [], settings()).fit(start)


def test_a_loss_that_is_not_finite_diverges(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    name = next(iter(start))
    poisoned = {**start, name: torch.full_like(start[name], math.nan)}
    with pytest.raises(DivergedError, match="local step 1"):
        trainer(model, DATA, settings()).fit(poisoned)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_huge_learning_rate_diverges(
    model: LoraModel, start: Params, settings: Settings, steps: int
) -> None:
    """Also in the last step, after which no loss is computed."""
    config = settings(optimizer="sgd", lr=1e6, clip_norm=None, local_steps=steps)
    with pytest.raises(DivergedError, match="lower lr"):
        trainer(model, DATA, config).fit(start, correct=constant(1e35))


def test_a_diverged_client_leaves_no_trace(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = settings()
    wanted = trainer(model, DATA, config).fit(start).params
    with pytest.raises(DivergedError):
        trainer(model, DATA, settings(optimizer="sgd", lr=1e6, clip_norm=None)).fit(
            start, correct=constant(1e35)
        )
    assert not model.model.training
    assert_equal(trainer(model, DATA, config).fit(start).params, wanted)


def test_a_client_does_not_depend_on_the_one_before(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    config = settings(lr=0.1)
    wanted = trainer(model, DATA[:2], config).fit(start).params
    trainer(model, DATA[2:], config, seed=9).fit(model.init(SPEC, 7), frozen=[start])
    assert_equal(trainer(model, DATA[:2], config).fit(start).params, wanted)


def test_the_start_is_left_as_it_was(model: LoraModel, start: Params, settings: Settings) -> None:
    before = tree_copy(start)
    trainer(model, DATA, settings(lr=0.1)).fit(start)
    assert_equal(start, before)


def test_global_random_states_are_neither_read_nor_moved(settings: Settings, start: Params) -> None:
    model = LoraModel(pretrained.load(settings()), dropout=0.5)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        results.append(trainer(model, DATA, settings()).fit(start).params)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert str(np.random.get_state()) == before[2]
    assert_equal(*results)


def test_dropout_depends_on_the_seed_alone(settings: Settings, start: Params) -> None:
    model = LoraModel(pretrained.load(settings()), dropout=0.5)
    one = DATA[1:2]  # a single example: there is no order to depend on
    first = trainer(model, one, settings(), seed=3).fit(start).params
    assert_equal(trainer(model, one, settings(), seed=3).fit(start).params, first)
    assert differs(trainer(model, one, settings(), seed=4).fit(start).params, first)
    without = LoraModel(pretrained.load(settings()))
    assert differs(trainer(without, one, settings(), seed=3).fit(start).params, first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(
    settings: Settings, start: Params, dropout: float
) -> None:
    results, calls = [], []
    for checkpointing in (False, True):
        config = settings(gradient_checkpointing=checkpointing, local_steps=1, batch_size=4)
        model = LoraModel(pretrained.load(config), dropout=dropout)
        counter: list[int] = []
        layer = next(m for n, m in model.model.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_, counter=counter: counter.append(1))
        results.append(trainer(model, DATA, config).fit(start).params)
        calls.append(len(counter))
    assert calls == [1, 2]  # the layer is computed again for the backward pass
    assert_close(results[1], results[0])
