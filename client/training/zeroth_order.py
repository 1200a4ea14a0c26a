"""Zeroth-order local training: forward passes only, at the memory of inference.

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE TAC 1992; in place and for language models: Malladi et al., "Fine-Tuning
Language Models with Just Forward Passes" (MeZO), NeurIPS 2023, arXiv 2305.17333. With differential
privacy of each example: Zhang et al., "DPZero: Private Fine-Tuning of Language Models without
Backpropagation", ICML 2024, arXiv 2310.09639; Tang et al., "Private Fine-tuning of Large Language
Models with Zeroth-order Optimization", arXiv 2401.04343.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corolla.client.training.padding import blank, padded
from corolla.client.training.slopes import Batch, PlainSlopes, PrivateSlopes, Scalars, Slopes
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate
from corolla.directions import signs
from corolla.directions.pools import SignPool
from corolla.directions.space import Space
from corolla.errors import DataError
from corolla.evaluation.scoring import loss_sum, sequence_losses
from corolla.host import logs
from corolla.models.trainable import Trainable
from corolla.privacy.example_level import ExampleLevel
from corolla.types import LoraSpec, Move, Params, Pool, Walk

_log = logs.logger("worker")

_RESYNC = 10
"""Steps in place after which half-precision weights are set anew from all scalars so far.

In bf16 the rounding of a round's steps can be larger than what they learnt; this costs a pass that
reads the base weights from disk.
"""


@dataclass
class ZerothOrder:
    """Two-sided differences along seeded directions, of one client in one round.

    A step measures `queries` directions on one batch, g = (L(w + eps z) - L(w - eps z)) / (2 eps),
    and moves w by -lr / queries · Σ g z, at one learning rate within a round. With `estimator`
    "kerzoo" it looks at distance r eps and multiplies g by `kernel(r)`.

    With `private`, L is the mean over the targets of one record of a Poisson sample, and slopes are
    summed by user, where rows name users, clipped and noised (see slopes.py).
    """

    model: Trainable
    lora: LoraSpec
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    round: int
    on_step: Callable[[int], None] | None = None
    private: ExampleLevel | None = None

    @property
    def queries(self) -> int:
        counted = self._slopes.counted
        return schedule.steps_per_round(self.config, counted) * self.config.queries

    @torch.no_grad()
    def walk(
        self,
        start: Params,
        moves: Sequence[Move],
        pool: Pool,
        directions: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Walk:
        if not (self.data or self.private):
            raise DataError("client has no example with a target left")
        config, per_step, source = self.config, self.config.queries, self._slopes
        steps = schedule.steps_per_round(config, source.counted)
        step_size = schedule.step_size(config, self.round, source.counted)
        space = self.model.enter(start, self.lora, moves)
        eps, reach = self._reach(steps * per_step)
        answers = self.private is not None
        scalars = Scalars(steps * per_step, dtype, directions, step_size, answers)
        for step, batch in enumerate(source.batches()):
            queries = range(step * per_step, (step + 1) * per_step)
            losses, slopes = list[Tensor](), list[Tensor]()
            for query in queries:
                distance, factor = reach[query]
                above, below = self._pair(space, pool, int(directions[query]), distance, batch)
                losses += [above, below]
                slopes.append(factor * (above - below) / (2 * eps))
            source.note(batch, losses)
            space.move(pool, scalars.take(queries, source.released(torch.stack(slopes), batch)))
            if self.model.drifts and isinstance(pool, SignPool) and (step + 1) % _RESYNC == 0:
                space = self.model.enter(start, self.lora, [*moves, scalars.so_far(pool)])
            if self.on_step:
                self.on_step(2 * per_step * self._length(batch))
        space.look(pool, {})
        scalars.check()
        return source.outcome(scalars, self.model.read(), steps)

    @property
    def _slopes(self) -> Slopes:
        if self.private:
            return PrivateSlopes(self.data, self.private, blank(self.model))
        return PlainSlopes(self.data, self.config, self.seed)

    def _length(self, batch: Batch) -> int:
        """The tokens of a pass."""
        sequences = [sequence for part in batch for sequence in part]
        if self.private:
            return self.config.max_length * len(sequences)
        return sum(len(sequence.input_ids) for sequence in sequences)

    def _pair(
        self, space: Space, pool: Pool, k: int, distance: float, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The losses of a batch at both sides of the point, so far along direction `k`."""
        space.look(pool, {k: distance})
        above = self._losses(batch)
        space.look(pool, {k: -distance})
        return above, self._losses(batch)

    def _reach(self, count: int) -> tuple[float, list[tuple[float, float]]]:
        """Eps as it is used, and (distance from the point, factor of the difference) by query."""
        # Few bits, so that adding and taking away what is shown in place rounds alike: fp32 weights
        # then hardly drift within a round.
        eps = float(torch.tensor(self.config.eps, dtype=torch.bfloat16))
        if self.config.estimator == "two_sided":
            return eps, [(eps, 1.0)] * count
        words = signs.words((self.seed, 0), 0, count, stream=3) >> np.uint64(11)
        drawn = 2.0 * (words * 2.0**-53) - 1.0
        return eps, [(eps * float(r), kernel(float(r))) for r in drawn]

    def _losses(self, parts: Batch) -> Tensor:
        """The loss of each part of a batch, in fp64."""
        loss = self._private_loss if self.private else self._loss
        return torch.tensor([loss(part) for part in parts], dtype=torch.float64)

    def _private_loss(self, example: Sequence[Encoded]) -> float:
        """The loss of one example, at the cost of any other; NaN of one that fails."""
        try:
            return self._loss(example)
        except Exception as error:  # noqa: BLE001 - an error would tell of the example
            _log.error("an example adds nothing", why=type(error).__name__)
            return math.nan

    def _loss(self, batch: Sequence[Encoded]) -> float:
        """Σ loss / Σ targets in fp32, micro-batch by micro-batch; the sums of these in fp64."""
        size = self.config.micro_batch_size or len(batch)
        total = 0.0
        for start in range(0, len(batch), size):
            total += float(self._sum(batch[start : start + size]))
        return total / max(1, sum(sequence.targets for sequence in batch))

    def _sum(self, part: Sequence[Encoded]) -> Tensor:
        """The summed loss of a micro-batch; under privacy at a cost that tells nothing of it."""
        model = self.model
        if self.private:
            return sequence_losses(model.model, padded(model, part, self.config.max_length)).sum()
        return loss_sum(model.model, collate(part, model.base.pad_id, model.device))


def kernel(r: float) -> float:
    """K(r) = 15/4 · r (5 - 7 r²) for r uniform in [-1, 1]: E[r K] = 1 and E[r³ K] = 0.

    Multiplied by it, a difference at distance r eps has no bias from third derivatives, for more
    variance: E[(r K)²] = 6.25. Mi et al., "KerZOO: Kernel Function Informed Zeroth-Order
    Optimization for Accurate and Accelerated LLM Fine-Tuning", arXiv 2505.18886.
    """
    return 15 / 4 * r * (5 - 7 * r * r)
