"""Cross-entropy a few rows at a time, against torch's on all logits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corolla.models.products import surprise

ROWS, WIDTH, WORDS = 11, 6, 40


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows: the last one is shorter."""
    monkeypatch.setattr(surprise, "_VALUES", 3 * WORDS + 7)


def drawn(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def head(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(WIDTH, WORDS, bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(drawn(*parameter.shape))
    return made.to(dtype).requires_grad_(False)


LABELS = torch.arange(ROWS) * 7 % WORDS


def gradients(loss: Tensor, states: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, [states])
    return found


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("bias", [True, False])
def test_sums_and_gradients_are_those_of_all_logits(bias: bool) -> None:
    states, own = drawn(ROWS, WIDTH).requires_grad_(), head(bias)
    found = surprise.summed(states, own, LABELS)
    wanted = cross_entropy(own(states), LABELS, reduction="sum")
    assert float((found - wanted).detach().abs() / wanted.detach()) <= 1e-6
    right = gradients(wanted / 7, states)
    assert (gradients(found / 7, states) - right).norm() <= 1e-6 * right.norm()


@pytest.mark.usefixtures("few")
def test_a_base_in_half_precision_is_summed_in_fp32() -> None:
    states = drawn(ROWS, WIDTH).bfloat16().requires_grad_()
    own = head(dtype=torch.bfloat16)
    found = surprise.summed(states, own, LABELS)
    wanted = cross_entropy(own(states).float(), LABELS, reduction="sum")
    assert found.dtype == torch.float32
    assert float((found - wanted).detach().abs() / wanted.detach()) <= 1e-2
    right = gradients(wanted, states).float()
    assert (gradients(found, states).float() - right).norm() <= 2e-2 * right.norm()


@pytest.mark.usefixtures("few")
def test_no_rows_sum_to_nothing() -> None:
    assert float(surprise.summed(drawn(0, WIDTH), head(), LABELS[:0])) == 0


def test_a_head_that_is_trained_or_watched_or_of_another_kind_is_not_carried() -> None:
    assert surprise.carried(head())
    assert not surprise.carried(head().requires_grad_(True))
    assert not surprise.carried(nn.Sequential(head()))
    watched = head()
    watched.register_forward_hook(lambda *_: None)
    assert not surprise.carried(watched)
