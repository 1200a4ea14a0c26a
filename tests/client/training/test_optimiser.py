"""Steps over all tensors at once, against torch's optimisers."""

import pytest
import torch
from torch import Tensor, nn

from corolla.client.training.optimiser import Optimiser
from corolla.config.run import RunConfig

SHAPES = [(8, 5), (3,), (1 << 9, 1 << 8), (5, 8), (2, 3, 4)]
"""Small ones, which are stepped on as one, around a large one."""

ABSENT = {1: (0, 2), 3: (4,)}
"""Step → the places of tensors that have no gradient in it."""


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    drawn = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(step))
    return drawn.permute(*range(len(shape))[::-1])  # laid out otherwise than the tensor


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("absent", [{}, ABSENT], ids=["all reached", "some not reached"])
def test_steps_are_those_of_torch(
    name: str, decay: float, clip: float | None, absent: dict[int, tuple[int, ...]]
) -> None:
    own, plain = parameters(), parameters()
    config = RunConfig.model_validate({"optimizer": name, "weight_decay": decay})
    optimiser = Optimiser(own, config)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    reference = kind(plain, lr=0.1, weight_decay=decay)
    for step, lr in enumerate((0.1, 0.05, 0.2, 0.1, 0.01)):
        for place, (mine, theirs) in enumerate(zip(own, plain, strict=True)):
            left = place in absent.get(step, ())
            mine.grad = None if left else gradient(SHAPES[place], step)
            theirs.grad = None if left else gradient(SHAPES[place], step)
        if clip is not None:
            nn.utils.clip_grad_norm_(plain, clip)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        optimiser.step(lr, clip)
        assert all(parameter.grad is None for parameter in own)
    for mine, theirs in zip(own, plain, strict=True):
        assert (mine - theirs).norm() <= 1e-7 * theirs.norm()


def test_a_step_without_any_gradient_changes_nothing() -> None:
    own, plain = parameters(), parameters()
    Optimiser(own, RunConfig.model_validate({"weight_decay": 0.1})).step(0.1, 1.0)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own, plain, strict=True))
