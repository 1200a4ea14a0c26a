"""Zeroth-order local training: forward passes only, at the memory of inference.

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE TAC 1992; in place and for language models: Malladi et al., "Fine-Tuning
Language Models with Just Forward Passes" (MeZO), NeurIPS 2023, arXiv 2305.17333.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from corolla import schedule, signs
from corolla.config import RunConfig
from corolla.directions import SignPool
from corolla.encoding import Encoded, collate, examples_of
from corolla.errors import DataError, DivergedError
from corolla.scoring import loss_sum
from corolla.trainable import Trainable
from corolla.types import LoraSpec, Move, Params, Pool, Walk

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
    """

    model: Trainable
    lora: LoraSpec
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    round: int
    on_step: Callable[[int], None] | None = None

    @property
    def queries(self) -> int:
        return schedule.steps_per_round(self.config, len(self.data)) * self.config.queries

    @torch.no_grad()
    def walk(
        self,
        start: Params,
        moves: Sequence[Move],
        pool: Pool,
        directions: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Walk:
        if not self.data:
            raise DataError("client has no example with a target left")
        config, per_step = self.config, self.config.queries
        steps = schedule.steps_per_round(config, len(self.data))
        step_size = schedule.step_size(config, self.round, len(self.data))
        space = self.model.enter(start, self.lora, moves)
        eps, reach = self._reach(steps * per_step)
        scalars = torch.zeros(steps * per_step, dtype=dtype)
        losses: list[float] = []
        seen: set[int] = set()
        skipped = tokens = 0
        for step, indices in enumerate(schedule.batches(config, len(self.data), self.seed)):
            batch = [self.data[i] for i in indices]
            seen |= examples_of(self.data, indices)
            update: dict[int, float] = {}
            for query in range(step * per_step, (step + 1) * per_step):
                k = int(directions[query])
                distance, factor = reach[query]
                space.look(pool, {k: distance})
                above = self._loss(batch)
                space.look(pool, {k: -distance})
                below = self._loss(batch)
                losses += [above, below]
                g = torch.tensor(factor * (above - below) / (2 * eps)).to(dtype)
                if not bool(torch.isfinite(g)):  # one NaN in a log would be there for ever
                    skipped += 1
                    continue
                scalars[query] = g
                update[k] = update.get(k, 0.0) + step_size * float(g)
            if not all(math.isfinite(scale) and abs(scale) < 1e30 for scale in update.values()):
                raise DivergedError(f"a step of {max(update.values(), key=abs):.1e}: lower lr")
            space.move(pool, update)
            if self.model.drifts and isinstance(pool, SignPool) and (step + 1) % _RESYNC == 0:
                own = _so_far(pool, directions, scalars, step_size)
                space = self.model.enter(start, self.lora, [*moves, own])
            tokens += sum(sequence.targets for sequence in batch)
            if self.on_step:
                self.on_step(2 * per_step * sum(len(sequence.input_ids) for sequence in batch))
        space.look(pool, {})
        finite = [loss for loss in losses if math.isfinite(loss)]
        if 2 * skipped > len(scalars):
            raise DivergedError(
                f"{skipped} of {len(scalars)} scalars are not finite in {dtype}: lower lr or "
                f"raise eps"
            )
        metrics = {
            "train_loss": math.fsum(finite) / len(finite),
            "target_tokens": float(tokens),
            "local_steps": float(steps),
            "skipped_scalars": float(skipped),
            "zero_scalars": float((scalars == 0).sum()) - skipped,
            "scalars": float(len(scalars)),
        }
        return Walk(scalars, step_size, self.model.read(), len(seen), metrics)

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

    def _loss(self, batch: Sequence[Encoded]) -> float:
        """Σ loss / Σ targets in fp32, micro-batch by micro-batch; the sums of these in fp64."""
        size = self.config.micro_batch_size or len(batch)
        pad, device = self.model.base.pad_id, self.model.device
        total = 0.0
        for start in range(0, len(batch), size):
            part = collate(batch[start : start + size], pad, device)
            total += float(loss_sum(self.model.model, part))
        return total / sum(sequence.targets for sequence in batch)


def _so_far(pool: SignPool, directions: Sequence[int], scalars: torch.Tensor, step: float) -> Move:
    """A client's own steps in this round, as one move."""
    sums = torch.zeros(pool.size, dtype=torch.float64)
    sums.index_add_(0, torch.tensor(directions), scalars.double())
    return Move(pool, sums, step)


def kernel(r: float) -> float:
    """K(r) = 15/4 · r (5 - 7 r²) for r uniform in [-1, 1]: E[r K] = 1 and E[r³ K] = 0.

    Multiplied by it, a difference at distance r eps has no bias from third derivatives, for more
    variance: E[(r K)²] = 6.25. Mi et al., "KerZOO: Kernel Function Informed Zeroth-Order
    Optimization for Accurate and Accelerated LLM Fine-Tuning", arXiv 2505.18886.
    """
    return 15 / 4 * r * (5 - 7 * r * r)
