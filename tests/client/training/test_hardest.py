"""The hardest sequences: their scores by hand and by transformers alone, and who is trained on."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from corolla.client.training import hardest
from corolla.client.training.first_order import FirstOrder
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.models.lora import LoraModel
from corolla.server.rounds.metrics import mean_metrics
from corolla.types import Params
from tests.client.training.dense import DATA, SCALING, SPEC, padded

Settings = Callable[..., RunConfig]


def score(p: list[float], label: int) -> float:
    (found,) = hardest.el2n(torch.tensor([p]).log(), torch.tensor([label])).tolist()
    return float(found)


def test_scores_by_hand() -> None:
    """‖p - onehot(y)‖: of (.7, .2, .1) the root of .09 + .04 + .01."""
    assert score([0.7, 0.2, 0.1], 0) == pytest.approx(math.sqrt(0.14), rel=1e-6)
    for v in (2, 7, 300):
        assert score([1 / v] * v, v - 1) == pytest.approx(math.sqrt(1 - 1 / v), rel=1e-6)
    certain = torch.tensor([[200.0, -200.0, 0.0]])
    assert hardest.el2n(certain, torch.tensor([0])).tolist() == [0.0]
    assert hardest.el2n(certain, torch.tensor([1])).tolist() == [pytest.approx(math.sqrt(2))]
    half = certain.to(torch.bfloat16)  # whatever type the model computes in
    assert hardest.el2n(half, torch.tensor([1])).dtype == torch.float32


def by_transformers(
    plain: transformers.PreTrainedModel, params: Params, data: list[Encoded]
) -> list[float]:
    """The mean over targets of the root of Σ_v p_v² - 2 p_y + 1, with dense weights."""
    weights: dict[str, Tensor] = dict(plain.named_parameters())
    for name in [n.removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]:
        delta = SCALING * params[name + ".lora_B"] @ params[name + ".lora_A"]
        weights[name + ".weight"] = weights[name + ".weight"] + delta
    found = []
    for own in data:
        batch = padded([own])
        batch.pop("labels")
        logits = torch.func.functional_call(plain, weights, kwargs=batch).logits[0]
        p = logits.double().softmax(-1)
        labels = [own.labels] if isinstance(own.labels, int) else own.labels
        targets = [(t - 1, label) for t, label in enumerate(labels) if t and label != -100]
        roots = [float((p[t].square().sum() - 2 * p[t, y] + 1).sqrt()) for t, y in targets]
        found.append(sum(roots) / len(roots))
    return found


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_scores_are_means_over_targets_of_the_model_that_was_received(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, at_once: int
) -> None:
    model.write(start, SPEC, ())
    found = hardest.scores(model, DATA, at_once)
    assert found == pytest.approx(by_transformers(plain, start, DATA), rel=1e-5)
    assert len({round(own, 4) for own in found}) == len(DATA)


def trained_on(model: LoraModel, start: Params, config: RunConfig, data: list[Encoded]) -> set[int]:
    """The examples of `data` whose labels decide what a client's training leads to."""
    seen: set[int] = set()
    taken: list[list[int]] = []
    original = schedule.batches

    def spy(own: RunConfig, sequences: int, seed: int) -> Any:
        for batch in original(own, sequences, seed):
            taken.append(batch)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "batches", spy)
        trainer = FirstOrder(model, SPEC, data, config, 5, 1)
        gradients: list[Any] = []
        patch.setattr(trainer, "_gradients", _noting(trainer, gradients))
        fit = trainer.fit(start)
    (own,) = gradients
    for batch in taken:
        seen |= {data.index(own.data[i]) for i in batch}
    assert fit.num_examples == len(seen)
    return seen


def _noting(trainer: FirstOrder, found: list[Any]) -> Callable[[Any], Any]:
    original = trainer._gradients

    def make(trained: Any) -> Any:
        found.append(original(trained))
        return found[-1]

    return make


def test_of_four_the_two_hardest_are_drawn_and_no_other(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    scores = by_transformers(plain, start, DATA)
    two = set(sorted(range(4), key=lambda i: -scores[i])[:2])
    config = settings(keep_hardest=0.5, local_steps=7, batch_size=1)
    assert trained_on(model, start, config, DATA) == two
    assert trained_on(model, start, settings(local_steps=7, batch_size=1), DATA) == {0, 1, 2, 3}
    hardest_one = settings(keep_hardest=0.25, local_epochs=3, batch_size=1)
    fit = FirstOrder(model, SPEC, DATA, hardest_one, 0, 1).fit(start)
    assert (fit.num_examples, fit.metrics["local_steps"]) == (1, 3.0)
    assert (fit.metrics["scored_sequences"], fit.metrics["kept_sequences"]) == (4.0, 1.0)
    told = mean_metrics({"a": fit.metrics, "b": fit.metrics}, {"a": 1, "b": 3})
    assert (told["scored_sequences"], told["kept_sequences"]) == (8.0, 2.0)


def test_training_on_the_kept_is_training_on_a_client_that_has_no_others(
    model: LoraModel, start: Params, plain: transformers.PreTrainedModel, settings: Settings
) -> None:
    """Bit for bit, learning rates included; which are kept depends on the start."""
    scores = by_transformers(plain, start, DATA)
    own = [DATA[i] for i in sorted(sorted(range(4), key=lambda i: -scores[i])[:3])]
    changes: dict[str, Any] = {"local_epochs": 2, "batch_size": 2, "schedule": "linear"}
    found = FirstOrder(model, SPEC, DATA, settings(keep_hardest=0.75, **changes), 0, 1).fit(start)
    wanted = FirstOrder(model, SPEC, own, settings(**changes), 0, 1).fit(start)
    whole = FirstOrder(model, SPEC, DATA, settings(**changes), 0, 1).fit(start)
    assert all(torch.equal(found.params[n], wanted.params[n]) for n in start)
    told = {"scored_sequences": 4.0, "kept_sequences": 3.0}
    assert found.metrics == {**wanted.metrics, **told}
    assert not all(torch.equal(found.params[n], whole.params[n]) for n in start)


def test_all_of_them_is_bit_identical_to_no_key(
    model: LoraModel, start: Params, settings: Settings
) -> None:
    many = [replace(DATA[i % 4], example=i) for i in range(40)]
    changes: dict[str, Any] = {"local_steps": 1, "batch_size": 2}
    found = FirstOrder(model, SPEC, many, settings(keep_hardest=1, **changes), 0, 1).fit(start)
    wanted = FirstOrder(model, SPEC, many, settings(**changes), 0, 1).fit(start)
    assert all(torch.equal(found.params[n], wanted.params[n]) for n in start)
    assert found == replace(wanted, params=found.params)


def test_at_most_sixteen_times_a_rounds_sequences_are_scored(
    model: LoraModel, start: Params, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the client's seed decides; with epochs the count of steps is of all it has."""
    many = [replace(DATA[i % 4], example=i) for i in range(100)]
    asked: list[list[int]] = []

    def score_by_number(model: LoraModel, data: list[Encoded], at_once: int) -> list[float]:
        asked.append([own.example or 0 for own in data])
        return [float(own.example or 0) for own in data]

    monkeypatch.setattr(hardest, "scores", score_by_number)
    steps = settings(keep_hardest=0.25, local_steps=1, batch_size=2)
    found = hardest.kept(model, many, steps, 0)
    assert len(asked[0]) == 32 and asked[0] == sorted(asked[0])
    assert [own.example for own in found] == asked[0][-8:]
    hardest.kept(model, many, steps, 0), hardest.kept(model, many, steps, 1)
    assert asked[1] == asked[0] != asked[2]
    epochs = settings(keep_hardest=0.03, local_epochs=1, batch_size=2)
    found = hardest.kept(model, many, epochs, 0)
    assert len(asked[3]) == 64  # 16 times two steps of two
    assert [own.example for own in found] == asked[3][-3:]
    assert schedule.steps_per_round(epochs, 100) == 2


def test_of_equal_scores_the_first_are_kept(
    model: LoraModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardest, "scores", lambda model, data, at_once: [1.0] * len(data))
    assert hardest.kept(model, DATA, settings(keep_hardest=0.5), 0) == DATA[:2]


@pytest.mark.parametrize(
    ("share", "sequences", "kept"),
    [(0.1, 30, 3), (0.1, 31, 4), (0.5, 4, 2), (0.5, 5, 3), (1e-9, 5, 1), (1, 7, 7), (None, 7, 7)],
)
def test_shares_are_decimal_and_rounded_up(
    settings: Settings, share: float | None, sequences: int, kept: int
) -> None:
    config = settings(keep_hardest=share, local_epochs=2, batch_size=1)
    assert schedule.hardest(config, sequences) == kept
    assert schedule.steps_per_round(config, sequences) == 2 * kept
