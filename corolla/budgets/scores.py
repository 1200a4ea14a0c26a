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

_BETA = 0.85
_PASSES = 2
"""Passes over the rows for sensitivities: a fresh B is zero, so the first step says nothing."""
_TINY = 1e-8
"""AdamW's eps: its first step is -lr g / (|g| + eps)."""


def importance(after: Tensor, move: Tensor) -> float:
    """Returns -⟨∇L(w + Δw), Δw⟩: how much of the loss a step Δw has saved, to first order.

    `after` is the gradient at the place that the step leads to. (GreenTrainer, Huang et al., ICLR
    2024, arXiv 2309.13192.)
    """
    return -float((after.double() * move.double()).sum())


class Sensitivity:
    """The dependence of the loss on each trained value, smoothed over steps.

    I = |w ∂L/∂w|, Ī ← β Ī + (1 - β) I, Ū ← β Ū + (1 - β) |I - Ī|, from 0 with β = 0.85; a value
    has Ī Ū. (AdaLoRA, Zhang et al., ICLR 2023, arXiv 2303.10512, eq. 8 to 10.)
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}

    def add(self, values: Params, gradients: Params) -> None:
        """One step, at these values."""
        for name, gradient in gradients.items():
            own = (values[name] * gradient).abs()
            before = self._mean.get(name, torch.zeros_like(own))
            self._mean[name] = mean = _BETA * before + (1 - _BETA) * own
            before = self._spread.get(name, torch.zeros_like(own))
            self._spread[name] = _BETA * before + (1 - _BETA) * (own - mean).abs()

    def values(self) -> Params:
        """Ī Ū of each value."""
        return {name: mean * self._spread[name] for name, mean in self._mean.items()}

    def module(self, name: str) -> float:
        """The sum over ranks k of the mean over row k of A and over column k of B."""
        found = self.values()
        rows, columns = found[name + factors.A].mean(1), found[name + factors.B].mean(0)
        return float((rows + columns).double().sum())


def of_modules(model: LoraModel, config: RunConfig, rows: Sequence[Encoded]) -> dict[str, float]:
    """The score of each module of a fresh adapter on all rows, as the key `scores` says.

    Raises ModelError for a gradient that is not finite.
    """
    start = model.init(config.lora, seeds.derive(config.seed, "init"))
    if config.scores == "sensitivity":
        return _sensitivities(model, config, start, rows)
    return _gains(model, config, start, rows)


def _gains(
    model: LoraModel, config: RunConfig, start: Params, rows: Sequence[Encoded]
) -> dict[str, float]:
    """The importance of each module, after one step on all rows.

    The step is that of the run's optimiser and lr, without weight decay. An adapter that starts as
    no change moves by its B alone.
    """
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


def _sensitivities(
    model: LoraModel, config: RunConfig, start: Params, rows: Sequence[Encoded]
) -> dict[str, float]:
    """The sensitivity of each module over steps of a batch each, _PASSES times over the rows."""
    seen, values = Sensitivity(), dict(start)
    for at in [*range(0, len(rows), config.batch_size)] * _PASSES:
        found = _gradients(model, config, values, rows[at : at + config.batch_size])
        seen.add(values, found)
        values = {name: own + _step(config, found[name]) for name, own in values.items()}
    return {name: seen.module(name) for name in model.shapes}


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
