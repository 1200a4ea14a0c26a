"""Where the gradients of first-order training come from: backpropagation, plain or private.

Both sources have one interface, so that the loop over a round's steps does not know which it has.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from corolla import seeds
from corolla.client.training import dpsgd, micro_batches
from corolla.client.training.trained import Trained, training
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate, examples_of
from corolla.errors import DivergedError
from corolla.evaluation.scoring import loss_sum
from corolla.models.trainable import Differentiable
from corolla.privacy.example_level import ExampleLevel
from corolla.types import Fit, Metrics, Params


class Gradients(Protocol):
    """The gradients of one client in one round, step by step."""

    @property
    def steps(self) -> int:
        """The steps that the learning rate runs over in a round."""

    @property
    def clip_norm(self) -> float | None:
        """The joint norm to which a step's gradient is still to be clipped; None: to none."""

    def attach(self, trained: Trained) -> AbstractContextManager[Iterator[int]]:
        """Writes the start into the model, which is in training mode until the end.

        The iterator leaves the gradient of each step where the optimiser looks, and yields the
        tokens that it took.
        """

    def outcome(self, params: Params, steps: int, distance: float) -> Fit:
        """The result of a round, with what may be told of it."""


@dataclass
class PlainGradients:
    """Gradients of the mean loss over the targets of each batch, and what was measured on them."""

    model: Differentiable
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    chosen: Metrics = field(default_factory=dict)
    """Metrics of how `data` was chosen among a client's sequences."""
    _losses: list[float] = field(default_factory=list)
    _targets: int = 0
    _seen: set[int] = field(default_factory=set)

    @property
    def steps(self) -> int:
        return schedule.steps_per_round(self.config, len(self.data))

    @property
    def clip_norm(self) -> float | None:
        return self.config.clip_norm

    @contextmanager
    def attach(self, trained: Trained) -> Iterator[Iterator[int]]:
        trained.write(trained.written())
        with training(self.model.model, seeds.derive(self.seed, "dropout")):
            yield self._iterate(trained)

    def _iterate(self, trained: Trained) -> Iterator[int]:
        batches = schedule.batches(self.config, len(self.data), self.seed)
        for step, indices in enumerate(batches):
            batch = [self.data[i] for i in indices]
            loss, targets = self._backward(batch)
            if not math.isfinite(loss):
                raise DivergedError(f"loss is {loss} at local step {step + 1}: lower lr")
            trained.pull()
            self._seen |= examples_of(self.data, indices)
            self._losses.append(loss)
            self._targets += targets
            yield sum(len(sequence.input_ids) for sequence in batch)

    def outcome(self, params: Params, steps: int, distance: float) -> Fit:
        metrics = {
            "train_loss": math.fsum(self._losses) / len(self._losses),
            "target_tokens": float(self._targets),
            "local_steps": float(steps),
            **self.chosen,
        }
        return Fit(params, len(self._seen), metrics, distance)

    def _backward(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        """Accumulate the gradient of Σ loss / Σ targets over the batch, for any micro-batch."""
        targets = sum(sequence.targets for sequence in batch)
        lengths = [len(sequence.input_ids) for sequence in batch]
        device, total = self.model.device, 0.0
        for places in micro_batches.parts(lengths, self.config.micro_batch_size, device):
            part = collate([batch[i] for i in places], self.model.base.pad_id, device)
            loss = loss_sum(self.model.model, part) / targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, targets


@dataclass
class PrivateGradients:
    """Gradients of DP-SGD (see dpsgd.py): clipped by example, with noise; no further clipping.

    Dropout is seeded by the operating system, not by the run: the bound on what one example changes
    holds for each outcome of the masks, as long as what an example gets does not depend on who else
    is in the batch. From a stream that is known, taking one example out shifts the masks of all
    after it, and the sum by several clips. (On a CPU, torch makes 32 bits of any seed.)
    """

    model: Differentiable
    data: Sequence[Encoded]
    config: RunConfig
    private: ExampleLevel

    @property
    def steps(self) -> int:
        return self.private.steps

    @property
    def clip_norm(self) -> float | None:
        return None

    @contextmanager
    def attach(self, trained: Trained) -> Iterator[Iterator[int]]:
        dropout = int.from_bytes(os.urandom(8))
        known = dpsgd.examples(self.data, self.private.examples)
        size = self.config.micro_batch_size or self.config.batch_size
        with training(self.model.model, dropout):
            dpsgd.self_test(
                self.model,
                lambda: trained.rehearse(dpsgd.lively(trained.written())),
                trained.names,
                size,
                fixed=True,
            )
        parameters = trained.write(trained.written())
        length = self.config.max_length
        clipper = dpsgd.Clipper(self.model, parameters, size, trained.seen, length)
        with training(self.model.model, dropout), clipper.attached():
            yield self._iterate(trained, known, clipper)

    def _iterate(
        self, trained: Trained, known: Sequence[dpsgd.Example], clipper: dpsgd.Clipper
    ) -> Iterator[int]:
        stepped = trained.stepped
        for batch in dpsgd.batches(self.private, known):
            gradients = self.private.noised(clipper(batch, self.private.clip))
            for name, parameter in stepped.items():
                parameter.grad = gradients[name].to(parameter.device)
            yield self.config.max_length * len(batch)

    def outcome(self, params: Params, steps: int, distance: float) -> Fit:
        """Returns the result of a round without anything that is measured on the data."""
        public = min(self.private.examples, steps * self.private.batch)
        return Fit(params, public, {"local_steps": float(steps)}, distance)
