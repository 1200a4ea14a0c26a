"""Steps of AdamW and SGD over all trained tensors at once.

Decoupled weight decay: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
arXiv 1711.05101. torch's optimisers take a dozen calls for each tensor; an adapter has hundreds of
small ones, whose gradients and moments are here one vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from corolla.config.run import RunConfig

_SMALL = 1 << 16
"""Values of a tensor up to which its gradient is copied into the vector of many."""

_MEAN, _SQUARE, _EPS = 0.9, 0.999, 1e-8
"""The decay of both moments, and what is added to the root of the second; those of torch."""


@dataclass
class Optimiser:
    """AdamW or SGD, as torch.optim has them, fresh at each start.

    A tensor without a gradient is left as it is, with its moments, as torch leaves it.
    """

    parameters: Sequence[nn.Parameter]
    config: RunConfig
    _runs: list["_Run"] = field(default_factory=list)

    def __post_init__(self) -> None:
        small: dict[torch.device, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.numel() > _SMALL:
                self._runs.append(_Run([parameter]))
            else:
                small.setdefault(parameter.device, []).append(parameter)
        self._runs += map(_Run, small.values())

    @torch.no_grad()
    def step(self, lr: float, clip_norm: float | None) -> None:
        """Takes a step along the gradients, clipped to a joint norm, and clears them."""
        clip = None if clip_norm is None else self._clip(clip_norm)
        runs: list[_Run] = []
        for run in self._runs:
            runs += [run] if run.whole else run.parts()
        self._runs = runs
        for run in runs:
            if run.whole:
                gradient = run.gradient()
                if clip is not None:
                    gradient.mul_(clip.to(gradient.device))
                if self.config.optimizer == "sgd":
                    run.descend(gradient, lr, self.config.weight_decay)
                else:
                    run.adapt(gradient, lr, self.config.weight_decay)
        for parameter in self.parameters:
            parameter.grad = None

    def _clip(self, most: float) -> Tensor:
        """The factor that brings all gradients to a joint norm of at most `most`."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm: Tensor = nn.utils.get_total_norm(gradients)
        return torch.clamp(most / (norm + 1e-6), max=1.0)


@dataclass
class _Run:
    """Tensors that take their steps as one: many small ones of a device, or a large one."""

    parameters: list[Tensor]
    steps: int = 0
    mean: Tensor | None = None
    square: Tensor | None = None

    @property
    def whole(self) -> bool:
        """True where each tensor has a gradient."""
        return all(parameter.grad is not None for parameter in self.parameters)

    def parts(self) -> list["_Run"]:
        """Runs of one tensor each, with the moments that this one has."""
        means, squares = self._each(self.mean), self._each(self.square)
        return [
            replace(self, parameters=[parameter], mean=mean, square=square)
            for parameter, mean, square in zip(self.parameters, means, squares, strict=True)
        ]

    def gradient(self) -> Tensor:
        """All gradients: a new vector, or that of the only tensor in its own memory."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        return found[0] if len(found) == 1 else torch.cat([own.reshape(-1) for own in found])

    def descend(self, gradient: Tensor, lr: float, decay: float) -> None:
        """Moves each tensor w to w - lr (g + decay w)."""
        pieces = self._pieces(gradient)
        if decay:
            torch._foreach_add_(pieces, self.parameters, alpha=decay)
        torch._foreach_add_(self.parameters, pieces, alpha=-lr)

    def adapt(self, gradient: Tensor, lr: float, decay: float) -> None:
        """Moves each tensor w to (1 - lr decay) w - lr m / (√v + eps).

        m and v are the moments of its gradients without their bias.
        """
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.steps += 1
        if decay:
            torch._foreach_mul_(self.parameters, 1 - lr * decay)
        self.mean.lerp_(gradient, 1 - _MEAN)
        self.square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
        root = self.square.sqrt().div_(math.sqrt(1 - _SQUARE**self.steps)).add_(_EPS)
        size = lr / (1 - _MEAN**self.steps)
        means, roots = self._pieces(self.mean), self._pieces(root)
        torch._foreach_addcdiv_(self.parameters, means, roots, value=-size)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        """The part of each tensor, in its form."""
        if len(self.parameters) == 1:
            return [flat.view(self.parameters[0].shape)]
        split = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [own.view(p.shape) for own, p in zip(split, self.parameters, strict=True)]

    def _each(self, flat: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.parameters) if flat is None else self._pieces(flat)
