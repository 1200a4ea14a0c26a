"""Tensors of a model that one client trains in one round, and those that its optimiser steps on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from corolla.models.trainable import Differentiable
from corolla.tensors import factors
from corolla.types import LoraSpec, Params


class Trained:
    """The trained tensors of a resident model, with matrices R in the place of A.

    Where the start has a matrix R (r, r), it is trained and A never moves: the model computes with
    R · A, and ∂L/∂R = ∂L/∂(R A) · Aᵀ. Costs two products of (r, r) by (r, in) a step.
    """

    def __init__(
        self,
        model: Differentiable,
        start: Params,
        spec: LoraSpec,
        frozen: Sequence[Params],
        train: Callable[[str], bool],
    ) -> None:
        self._model, self._start = model, start
        self._spec, self._frozen, self._train = spec, frozen, train
        names = sorted(name for name in start if factors.is_r(name))  # a message has no order
        self._r = {name: nn.Parameter(start[name].clone()) for name in names}
        self._a = {name: _a_of(name) for name in names}
        self._written: dict[str, nn.Parameter] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        """The trained parameters of the model by name, as it was written last."""

    @property
    def names(self) -> list[str]:
        """The names of what is trained of the model."""
        return [name for name, _ in self._model.parameters() if self._train(name)]

    @property
    def stepped(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser steps on, by name."""
        return {n: p for n, p in self.parameters.items() if n not in self._a.values()} | self._r

    def written(self) -> Params:
        """The start as the model knows it: A multiplied out, no R."""
        plain = {n: t for n, t in self._start.items() if n not in self._r}
        return plain | {
            self._a[n]: r.detach() @ self._start[self._a[n]] for n, r in self._r.items()
        }

    def write(self, params: Params) -> dict[str, nn.Parameter]:
        """Writes `params` into the model; what is trained of it has gradients from now on."""
        self._model.write(params, self._spec, self._frozen)
        self._written = dict(self._model.parameters())
        self.parameters = {n: p for n, p in self._written.items() if self._train(n)}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        return self.parameters

    def rehearse(self, params: Params) -> dict[str, nn.Parameter]:
        """Writes `params` at scaling 1 without frozen blocks: nothing of what was received."""
        spec, frozen = self._spec, self._frozen
        self._spec, self._frozen = LoraSpec(spec.rank, float(spec.rank)), ()
        try:
            return self.write(params)
        finally:
            self._spec, self._frozen = spec, frozen

    def pull(self) -> None:
        """The gradients of R from those of R · A."""
        for name, r in self._r.items():
            effective = self._written[self._a[name]]
            if effective.grad is not None:
                r.grad = effective.grad.cpu() @ self._start[self._a[name]].T
                effective.grad = None

    def seen(self, gradients: Params) -> dict[str, Tensor]:
        """Gradients (n, ...) by example: those of R replace those of R · A."""
        found = {n: g for n, g in gradients.items() if n not in self._a.values()}
        for name, a in self._a.items():
            if a in gradients:
                found[name] = gradients[a] @ self._start[a].T.to(gradients[a])
        return found

    def push(self) -> None:
        """Writes R · A into the model."""
        with torch.no_grad():
            for name, r in self._r.items():
                self._written[self._a[name]].copy_(r @ self._start[self._a[name]])

    def finish(self) -> Params:
        """The tensors after training, A as it was given; the model has no gradients any more.

        Tensors that were not trained are those of the start, not copies of them.
        """
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        still = {n: t for n, t in self._start.items() if n not in self.parameters}
        moved = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        cores = {name: r.detach().clone() for name, r in self._r.items()}
        given = {a: self._start[a].clone() for a in self._a.values()}
        return {**still, **moved, **cores, **given}


def _a_of(name: str) -> str:
    return name.removesuffix(factors.R) + factors.A


@contextmanager
def training(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode with a random state of its own: dropout can only draw from the global one."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.eval()
            model.zero_grad(set_to_none=True)
