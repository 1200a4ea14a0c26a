"""First-order local training: backpropagation to the trained tensors, all others frozen."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from corolla import seeds
from corolla.client.training import dpsgd
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate, examples_of
from corolla.errors import DataError, DivergedError
from corolla.evaluation.scoring import loss_sum
from corolla.models.trainable import Differentiable
from corolla.privacy.example_level import ExampleLevel
from corolla.tensors import factors
from corolla.types import Correct, Fit, LoraSpec, Params


@dataclass
class FirstOrder:
    """AdamW or SGD over the trainable tensors of one client in one round.

    The optimiser is fresh in each round, as in the papers; the learning rate runs through its
    warm-up and decay over all rounds. Peak memory: base model, activations of one micro-batch,
    and 16 bytes per trained value (value, gradient, two moments).

    With `private`, dropout is seeded by the operating system, not by the run: the bound on what one
    example changes holds for each outcome of the masks, as long as what an example gets does not
    depend on who else is in the batch. From a stream that is known, taking one example out shifts
    the masks of all after it, and the sum by several clips. (On a CPU, torch makes 32 bits of any
    seed.)
    """

    model: Differentiable
    lora: LoraSpec
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    round: int
    on_step: Callable[[int], None] | None = None
    private: ExampleLevel | None = None
    """Who is in a step, and the noise, under example-level differential privacy (see dpsgd.py)."""

    def init(self, seed: int) -> Params:
        return self.model.init(self.lora, seed)

    def fit(
        self,
        start: Params,
        *,
        frozen: Sequence[Params] = (),
        train: Callable[[str], bool] = lambda name: True,
        correct: Correct | None = None,
        strength: float = 1.0,
    ) -> Fit:
        if not (self.data or self.private):
            raise DataError("client has no example with a target left")
        cores = _Cores(start)
        spec = replace(self.lora, alpha=self.lora.alpha * strength)
        dropout = seeds.derive(self.seed, "dropout")
        if self.private:
            dropout = int.from_bytes(os.urandom(8))
        known: list[dpsgd.Example] = []
        if self.private:
            known = dpsgd.examples(self.data, self.private.examples)

            def ready() -> Mapping[str, nn.Parameter]:
                self.model.write(dpsgd.lively(cores.written()), spec, frozen)
                return self._trained(train)

            names = [name for name, _ in self.model.parameters() if train(name)]
            with _training(self.model.model, dropout):
                dpsgd.self_test(self.model, ready, names, self._at_a_time)
        self.model.write(cores.written(), spec, frozen)
        trained = self._trained(train)
        parameters = dict(self.model.parameters())
        stepped = cores.instead_of(trained)
        optimizer = self._optimizer(list(stepped.values()))
        told = _Told()
        attached: AbstractContextManager[object] = nullcontext()
        if self.private:
            clipper = dpsgd.Clipper(self.model, trained, self._at_a_time, cores.seen)
            gradients = self._private(self.private, known, clipper, stepped)
            attached, per_round = clipper.attached(), self.private.steps
        else:
            gradients = self._plain(parameters, cores, told)
            per_round = schedule.steps_per_round(self.config, len(self.data))
        steps, distance = 0, 0.0
        with _training(self.model.model, dropout), attached:
            for step, tokens in enumerate(gradients):
                self._correct(stepped, correct)
                if self.config.clip_norm is not None and not self.private:
                    nn.utils.clip_grad_norm_(stepped.values(), self.config.clip_norm)
                lr = self.config.lr * schedule.rate(self.config, self.round, per_round, step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                cores.push(parameters)
                distance += lr
                steps += 1
                if self.on_step:
                    self.on_step(tokens)
        for parameter in trained.values():
            parameter.requires_grad_(False)
        params = {**self.model.read(), **cores.read()}
        if not all(bool(torch.isfinite(t).all()) for t in params.values()):
            raise DivergedError("weights are not finite after local training: lower lr")
        if self.private:  # what is measured on the data stays here
            public = min(self.private.examples, steps * self.private.batch)
            return Fit(params, public, {"local_steps": float(steps)}, distance)
        metrics = {
            "train_loss": math.fsum(told.losses) / len(told.losses),
            "target_tokens": float(told.targets),
            "local_steps": float(steps),
        }
        return Fit(params, len(told.seen), metrics, distance)

    @property
    def _at_a_time(self) -> int:
        return self.config.micro_batch_size or self.config.batch_size

    def _trained(self, train: Callable[[str], bool]) -> dict[str, nn.Parameter]:
        """What is trained of the model as it was written, from now on with gradients."""
        trained = {name: p for name, p in self.model.parameters() if train(name)}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return trained

    def _plain(
        self, parameters: Mapping[str, nn.Parameter], cores: "_Cores", told: "_Told"
    ) -> Iterator[int]:
        """Leaves the gradient of each step where the optimiser looks; yields the tokens it took."""
        batches = schedule.batches(self.config, len(self.data), self.seed)
        for step, indices in enumerate(batches):
            batch = [self.data[i] for i in indices]
            loss, targets = self._backward(batch)
            if not math.isfinite(loss):
                raise DivergedError(f"loss is {loss} at local step {step + 1}: lower lr")
            cores.pull(parameters)
            told.seen |= examples_of(self.data, indices)
            told.losses.append(loss)
            told.targets += targets
            yield sum(len(sequence.input_ids) for sequence in batch)

    def _private(
        self,
        private: ExampleLevel,
        known: Sequence[dpsgd.Example],
        clipper: dpsgd.Clipper,
        stepped: Mapping[str, nn.Parameter],
    ) -> Iterator[int]:
        """As `_plain`, with gradients that are noisy; no further clipping is of use."""
        for batch in dpsgd.batches(private, known):
            gradients = private.noised(clipper(batch, private.clip))
            for name, parameter in stepped.items():
                parameter.grad = gradients[name].to(parameter.device)
            yield sum(len(sequence.input_ids) for example in batch for sequence in example)

    def _backward(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        """Accumulate the gradient of Σ loss / Σ targets over the batch, for any micro-batch."""
        targets = sum(sequence.targets for sequence in batch)
        size = self.config.micro_batch_size or len(batch)
        total = 0.0
        for start in range(0, len(batch), size):
            part = collate(batch[start : start + size], self.model.base.pad_id, self.model.device)
            loss = loss_sum(self.model.model, part) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, targets

    def _correct(self, trained: dict[str, nn.Parameter], correct: Correct | None) -> None:
        if correct is None:
            return
        gradients = {n: p.grad for n, p in trained.items() if p.grad is not None}
        weights = {n: p.detach() for n, p in trained.items() if n in gradients}
        for name, gradient in correct(gradients, weights).items():
            trained[name].grad = gradient

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr, decay = self.config.lr, self.config.weight_decay
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr, weight_decay=decay)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


@dataclass
class _Told:
    """What training without privacy tells of itself."""

    losses: list[float] = field(default_factory=list)
    targets: int = 0
    seen: set[int] = field(default_factory=set)


class _Cores:
    """Matrices R (r, r) that are trained in the place of A: the model computes with R · A.

    ∂L/∂R = ∂L/∂(R A) · Aᵀ, and A never moves. Costs two products of (r, r) by (r, in) a step.
    """

    def __init__(self, start: Params) -> None:
        self._start = start
        names = sorted(name for name in start if factors.is_r(name))  # a message has no order
        self._r = {name: nn.Parameter(start[name].clone()) for name in names}
        self._a = {name: _a_of(name) for name in names}

    def written(self) -> Params:
        """`start` as the model knows it: A multiplied out, no R."""
        plain = {n: t for n, t in self._start.items() if n not in self._r}
        return plain | {
            self._a[n]: r.detach() @ self._start[self._a[n]] for n, r in self._r.items()
        }

    def instead_of(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What the optimiser steps on."""
        return {n: p for n, p in trained.items() if n not in self._a.values()} | self._r

    def pull(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The gradients of R from those of R · A."""
        for name, r in self._r.items():
            effective = parameters[self._a[name]]
            if effective.grad is not None:
                r.grad = effective.grad.cpu() @ self._start[self._a[name]].T
                effective.grad = None

    def seen(self, gradients: Params) -> dict[str, Tensor]:
        """Gradients (n, ...) with those of R, by example, in the place of those of R · A."""
        found = {n: g for n, g in gradients.items() if n not in self._a.values()}
        for name, a in self._a.items():
            if a in gradients:
                found[name] = gradients[a] @ self._start[a].T.to(gradients[a])
        return found

    def push(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """R · A into the model."""
        with torch.no_grad():
            for name, r in self._r.items():
                parameters[self._a[name]].copy_(r @ self._start[self._a[name]])

    def read(self) -> Params:
        """R as trained, and A as it was given."""
        cores = {name: r.detach().clone() for name, r in self._r.items()}
        return cores | {a: self._start[a].clone() for a in self._a.values()}


def _a_of(name: str) -> str:
    return name.removesuffix(factors.R) + factors.A


@contextmanager
def _training(model: nn.Module, seed: int) -> Iterator[None]:
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
