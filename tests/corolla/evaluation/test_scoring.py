import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor, nn

from corolla.data.encoding import IGNORE, Encoded, collate
from corolla.evaluation.scoring import (
    halves,
    log_likelihoods,
    loss_sum,
    macro_f1,
    score_by_row,
    standard_error,
)
from corolla.models.products import surprise
from corolla.types import Metrics

CPU = torch.device("cpu")
DATA = [
    Encoded([40, 41, 42, 43, 44], [40, 41, 42, 43, 44]),
    Encoded([50, 51], [50, 51]),
    Encoded([60, 61, 62, 0], [IGNORE, IGNORE, IGNORE, 0]),
    Encoded([70, 71, 72], [IGNORE, 71, 72]),
]


def score(
    model: nn.Module, data: Sequence[Encoded], pad_id: int, device: torch.device, size: int = 8
) -> Metrics:
    return score_by_row(model, data, range(len(data)), pad_id, device, size)[0]


class Fixed(nn.Module):
    """Logits that are given, whatever the input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[: len(input_ids), : input_ids.shape[1]])

    def get_output_embeddings(self) -> None:
        return None


@pytest.fixture
def model(tiny_model: Path) -> transformers.PreTrainedModel:
    loaded: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model
    )
    return loaded.eval()


def test_the_loss_of_given_logits_by_hand() -> None:
    """Vocabulary of two; p(1) is 3/4, then 1/2 and 1/5."""
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.8, 0.2], [0.5, 0.5]]]))
    batch = collate([Encoded([0, 1, 0, 1], [0, 1, 0, 1])], 0, CPU)
    wanted = -math.log(0.75) - math.log(0.5) - math.log(0.2)
    assert float(loss_sum(Fixed(logits), batch)) == pytest.approx(wanted, rel=1e-6)
    masked = collate([Encoded([0, 1, 0, 1], [0, IGNORE, IGNORE, 1])], 0, CPU)
    assert float(loss_sum(Fixed(logits), masked)) == pytest.approx(-math.log(0.2), rel=1e-6)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(1, 9, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = collate([Encoded(range(9), range(9))], 0, CPU)
    wanted = nn.functional.cross_entropy(
        logits[0, :-1].double(), torch.arange(1, 9), reduction="sum"
    )
    found = loss_sum(Fixed(logits), batch)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_the_loss_is_that_of_transformers(model: transformers.PreTrainedModel) -> None:
    batch = collate(DATA, 1, CPU)
    with torch.no_grad():
        assert float(loss_sum(model, batch)) / 8 == pytest.approx(
            float(model(**batch).loss), rel=1e-6
        )


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_score_does_not_depend_on_batches(model: transformers.PreTrainedModel, size: int) -> None:
    with torch.no_grad():
        losses, right = 0.0, 0
        for sequence in DATA:  # one at a time, without any padding
            ids, labels = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
            out = model(input_ids=ids, labels=labels)
            kept = labels[0, 1:] != IGNORE
            losses += float(out.loss) * int(kept.sum())
            right += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:])[kept].sum())
    found = score(model, list(reversed(DATA)), 1, CPU, size)
    assert found["loss"] == pytest.approx(losses / 8, rel=1e-5)
    assert found["accuracy"] == right / 8
    assert found["targets"] == 8.0


def test_the_standard_error_is_that_of_rows_drawn_anew() -> None:
    """Of equal rows that of scipy's mean; of unequal ones that of means of many samples."""
    rng = np.random.default_rng(0)
    equal = {i: (4 * float(x), 4) for i, x in enumerate(rng.normal(3.0, 1.0, 50))}
    wanted = stats.sem([loss / 4 for loss, _ in equal.values()])
    assert standard_error(equal) == pytest.approx({"loss_error": wanted}, rel=1e-12)
    targets = rng.integers(1, 30, 400)
    rows = {i: (float(n * rng.normal(2.0, 0.5)), int(n)) for i, n in enumerate(targets)}
    losses, numbers = np.array(list(rows.values())).T
    drawn = rng.integers(0, len(rows), (4000, len(rows)))
    means = losses[drawn].sum(1) / numbers[drawn].sum(1)
    assert standard_error(rows)["loss_error"] == pytest.approx(means.std(), rel=0.05)
    assert standard_error({0: (1.0, 1)}) == {}


def test_sequences_of_one_row_count_as_one(model: transformers.PreTrainedModel) -> None:
    own = [score(model, [sequence], 1, CPU) for sequence in DATA]
    sums = [(s["loss"] * s["targets"], int(s["targets"])) for s in own]
    metrics, found = score_by_row(model, DATA, [7, 1, 7, 2], 1, CPU, 3)
    assert metrics == score(model, DATA, 1, CPU, 3)
    assert found.keys() == {1, 2, 7}
    first = (sums[0][0] + sums[2][0], sums[0][1] + sums[2][1])
    for row, wanted in ((7, first), (1, sums[1]), (2, sums[3])):
        assert found[row] == pytest.approx(wanted, rel=1e-5)


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [9.0, 0.0]]])
    found = score(Fixed(logits), [Encoded([0, 1, 1, 1], [0, 1, 1, 1])], 0, CPU)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_classes_are_scored_one_a_row() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]))

    class Classifier(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=logits)

    found = score(Classifier(), [Encoded([5], 0), Encoded([6], 2)], 0, CPU)
    assert found["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.1)) / 2, rel=1e-6)
    assert (found["accuracy"], found["targets"]) == (0.5, 2.0)
    # of class 0: one hit, one false alarm; of class 2: one miss; nobody said 1
    assert found["f1"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_that_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    noise = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 4, (30,), generator=noise).tolist()
    guessed = torch.randint(1, 6, (30,), generator=noise).tolist()
    found = macro_f1(list(zip(wanted, guessed, strict=True)))
    assert found == pytest.approx(metrics.f1_score(wanted, guessed, average="macro"))


def test_macro_f1_by_hand() -> None:
    """Three of the first class right and one missed; the second is guessed once, rightly not."""
    assert macro_f1([(0, 0), (0, 0), (0, 0), (0, 1)]) == pytest.approx((6 / 7 + 0) / 2)
    assert macro_f1([(3, 3), (5, 5)]) == 1.0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_log_likelihoods_keep_the_order_of_the_data(
    model: transformers.PreTrainedModel, size: int
) -> None:
    wanted = []
    for sequence in DATA:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
        with torch.no_grad():
            wanted.append(-float(model(input_ids=ids, labels=labels).loss) * sequence.targets)
    assert log_likelihoods(model, DATA, 1, CPU, size) == pytest.approx(wanted, rel=1e-5)
    assert log_likelihoods(model, [], 1, CPU, size) == []


def test_nothing_to_score_is_not_a_number(model: transformers.PreTrainedModel) -> None:
    for data in ([], [Encoded([5, 6], [5, IGNORE])]):
        found = score(model, data, 1, CPU)
        assert math.isnan(found["loss"])
        assert math.isnan(found["accuracy"])
        assert found["targets"] == 0.0


def test_a_score_leaves_no_gradients(model: transformers.PreTrainedModel) -> None:
    score(model, DATA, 1, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_choice_and_its_report_are_of_different_rows() -> None:
    rows = {0: (4.0, 2), 1: (9.0, 3), 2: (8.0, 2), 4: (0.0, 2)}  # row 3 has no target
    assert halves(rows) == {"loss_choosing": 12 / 6, "loss_reported": 3.0}
    assert halves(rows, 1) == {"loss_choosing": 3.0, "loss_reported": 12 / 6}
    assert (halves({0: (1.0, 2)}), halves({0: (1.0, 2)}, 3)) == (
        {"loss_choosing": 0.5},
        {"loss_reported": 0.5},
    )
    assert halves({}) == {}


def cohere(scale: float) -> transformers.PreTrainedModel:
    """A model that multiplies the logits of its output layer by `scale`."""
    config = transformers.CohereConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, logit_scale=scale,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CohereForCausalLM(config).eval()


@pytest.mark.parametrize(("scale", "in_parts"), [(1.0, True), (0.5, False)])
def test_logits_of_a_large_vocabulary_are_computed_in_parts_where_nothing_follows_them(
    monkeypatch: pytest.MonkeyPatch, scale: float, in_parts: bool
) -> None:
    model = cohere(scale)
    model.lm_head.requires_grad_(False)
    trained = model.model.layers[0].mlp.down_proj.weight
    batch = collate(DATA, 0, CPU)
    wanted = loss_sum(model, batch)
    (right,) = torch.autograd.grad(wanted, [trained])
    monkeypatch.setattr(surprise, "_VALUES", 250)  # two rows and a half
    summed: list[int] = []
    whole = surprise.summed

    def watched(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        summed.append(len(states))
        return whole(states, head, labels)

    monkeypatch.setattr(surprise, "summed", watched)
    found = loss_sum(model, batch)
    (gradient,) = torch.autograd.grad(found, [trained])
    assert summed == ([sum(sequence.targets for sequence in DATA)] if in_parts else [])
    assert float(found.detach() / wanted.detach()) == pytest.approx(1, rel=1e-6)
    assert (gradient - right).norm() <= 1e-5 * right.norm()
    with torch.no_grad():
        assert torch.equal(loss_sum(model, batch), wanted.detach())
