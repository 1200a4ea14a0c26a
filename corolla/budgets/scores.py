"""Scores of modules from rows that belong to no client."""

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.errors import ModelError
from corolla.evaluation.scoring import loss_sum
from corolla.models.lora import LoraModel
from corolla.tensors import factors
from corolla.types import Params

_TINY = 1e-8
"""AdamW's eps: its first step is -lr g / (|g| + eps)."""


def importance(after: Tensor, move: Tensor) -> float:
    """Returns -⟨∇L(w + Δw), Δw⟩: how much of the loss a step Δw has saved, to first order.

    `after` is the gradient at the place that the step leads to. (GreenTrainer, Huang et al., ICLR
    2024, arXiv 2309.13192.)
    """
    return -float((after.double() * move.double()).sum())


def of_modules(model: LoraModel, config: RunConfig, rows: Sequence[Encoded]) -> dict[str, float]:
    """The importance of each module of an adapter, after one step on all rows from a fresh one.

    The step is that of the run's optimiser and lr, without weight decay. An adapter that starts as
    no change moves by its B alone. Raises ModelError for a gradient that is not finite.
    """
    start = model.init(config.lora, seeds.derive(config.seed, "init"))
    first = _gradients(model, config, start, rows)
    moves = {name: _step(config, gradient) for name, gradient in first.items()}
    moved = {**start, **{name: start[name] + move for name, move in moves.items()}}
    then = _gradients(model, config, moved, rows)
    found = dict.fromkeys(model.shapes, 0.0)
    for name, move in moves.items():
        if not factors.is_head(name):
            module = name.removesuffix(factors.A).removesuffix(factors.B)
            found[module] += importance(then[name], move)
    return found


def _gradients(
    model: LoraModel, config: RunConfig, params: Params, rows: Sequence[Encoded]
) -> Params:
    """The gradients of the mean loss over all targets, on the CPU in fp32."""
    model.write(params, config.lora)
    trained = dict(model.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    size = config.micro_batch_size or config.batch_size
    targets = sum(sequence.targets for sequence in rows)
    sums = {name: torch.zeros(parameter.shape) for name, parameter in trained.items()}
    for at in range(0, len(rows), size):
        batch = collate(rows[at : at + size], model.base.pad_id, model.device)
        loss = loss_sum(model.model, batch) / targets
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        for name, gradient in zip(trained, found, strict=True):
            sums[name] += gradient.cpu().float()
    if odd := next((n for n, own in sums.items() if not bool(torch.isfinite(own).all())), None):
        raise ModelError(
            f"the gradient of {odd} on {config.public} is not finite: use dtype=float32"
        )
    return sums


def _step(config: RunConfig, gradient: Tensor) -> Tensor:
    """The optimiser's first step."""
    if config.optimizer == "sgd":
        return -config.lr * gradient
    return -config.lr * gradient / (gradient.abs() + _TINY)
