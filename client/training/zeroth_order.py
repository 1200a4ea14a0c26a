"""Zeroth-order local training: forward passes only, at the memory of inference.

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE TAC 1992; in place and for language models: Malladi et al., "Fine-Tuning
Language Models with Just Forward Passes" (MeZO), NeurIPS 2023, arXiv 2305.17333. With differential
privacy of each example: Zhang et al., "DPZero: Private Fine-Tuning of Language Models without
Backpropagation", ICML 2024, arXiv 2310.09639; Tang et al., "Private Fine-tuning of Large Language
Models with Zeroth-order Optimization", arXiv 2401.04343.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corolla.client.training import dpsgd
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, collate, examples_of
from corolla.directions import signs
from corolla.directions.pools import SignPool
from corolla.errors import DataError, DivergedError
from corolla.evaluation.scoring import loss_sum
from corolla.models.trainable import Trainable
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.randomness import clip_factors
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

    With `private`, L is the mean over the targets of one example of a Poisson sample: the vector of
    an example's slopes in a step is clipped to a norm C, their sum gets noise of standard deviation
    z C in each query and is divided by the expected size of the sample. The directions are public,
    so that these scalars are all there is to protect; what is made of them is private as they are.
    Each example is measured by itself: beside others of other lengths its loss would round
    differently, and divided by 2 eps that is no longer nothing.
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
        return schedule.steps_per_round(self.config, self._counted) * self.config.queries

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
        config, per_step = self.config, self.config.queries
        steps = schedule.steps_per_round(config, self._counted)
        step_size = schedule.step_size(config, self.round, self._counted)
        space = self.model.enter(start, self.lora, moves)
        eps, reach = self._reach(steps * per_step)
        scalars = torch.zeros(steps * per_step, dtype=dtype)
        losses: list[Tensor] = []
        skipped = tokens = 0
        for step, batch in enumerate(self._batches()):
            queries = range(step * per_step, (step + 1) * per_step)
            slopes: list[Tensor] = []
            for query in queries:
                k = int(directions[query])
                distance, factor = reach[query]
                space.look(pool, {k: distance})
                above = self._losses(batch)
                space.look(pool, {k: -distance})
                below = self._losses(batch)
                losses += [above, below]
                slopes.append(factor * (above - below) / (2 * eps))
            released = self._released(torch.stack(slopes)).float().to(dtype)
            update: dict[int, float] = {}
            for query, g in zip(queries, released, strict=True):
                if not bool(torch.isfinite(g)):  # one NaN in a log would be there for ever
                    skipped += 1
                    continue
                scalars[query] = g
                k = int(directions[query])
                update[k] = update.get(k, 0.0) + step_size * float(g)
            if not all(math.isfinite(scale) and abs(scale) < 1e30 for scale in update.values()):
                raise DivergedError(f"a step of {max(update.values(), key=abs):.1e}: lower lr")
            space.move(pool, update)
            if self.model.drifts and isinstance(pool, SignPool) and (step + 1) % _RESYNC == 0:
                own = _so_far(pool, directions, scalars, step_size)
                space = self.model.enter(start, self.lora, [*moves, own])
            tokens += sum(sequence.targets for part in batch for sequence in part)
            if self.on_step:
                length = sum(len(sequence.input_ids) for part in batch for sequence in part)
                self.on_step(2 * per_step * length)
        space.look(pool, {})
        if 2 * skipped > len(scalars):
            raise DivergedError(
                f"{skipped} of {len(scalars)} scalars are not finite in {dtype}: lower lr or "
                f"raise eps"
            )
        if self.private:
            return Walk(
                scalars,
                step_size,
                self.model.read(),
                min(self.private.examples, steps * self.private.batch),
                {"local_steps": float(steps)},
            )
        used = [i for at in schedule.batches(config, len(self.data), self.seed) for i in at]
        finite = [loss for loss in torch.cat(losses).tolist() if math.isfinite(loss)]
        metrics = {
            "train_loss": math.fsum(finite) / len(finite),
            "target_tokens": float(tokens),
            "local_steps": float(steps),
            "skipped_scalars": float(skipped),
            "zero_scalars": float((scalars == 0).sum()) - skipped,
            "scalars": float(len(scalars)),
        }
        seen = examples_of(self.data, used)
        return Walk(scalars, step_size, self.model.read(), len(seen), metrics)

    @property
    def _counted(self) -> int:
        """What epochs are counted in: sequences, or examples where privacy keeps the former."""
        return self.private.examples if self.private else len(self.data)

    def _batches(self) -> Iterator[list[Sequence[Encoded]]]:
        """The parts of each step's batch whose slopes are told apart."""
        if self.private:
            known = dpsgd.examples(self.data, self.private.examples)
            for drawn in dpsgd.batches(self.private, known):
                yield [own for own in drawn if own]
        else:
            for indices in schedule.batches(self.config, len(self.data), self.seed):
                yield [[self.data[i] for i in indices]]

    def _released(self, slopes: Tensor) -> Tensor:
        """(queries,) of (queries, parts): under privacy clipped, summed and noised."""
        if not self.private:
            return slopes[:, 0]
        factors = clip_factors(slopes.norm(dim=0), self.private.clip)
        clipped = torch.where(factors > 0, factors * slopes, 0.0)  # 0 · NaN is NaN
        return self.private.noised({"slopes": clipped.sum(1)})["slopes"]

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

    def _losses(self, parts: Sequence[Sequence[Encoded]]) -> Tensor:
        """The loss of each part of a batch, in fp64."""
        return torch.tensor([self._loss(part) for part in parts], dtype=torch.float64)

    def _loss(self, batch: Sequence[Encoded]) -> float:
        """Σ loss / Σ targets in fp32, micro-batch by micro-batch; the sums of these in fp64."""
        size = self.config.micro_batch_size or len(batch)
        pad, device = self.model.base.pad_id, self.model.device
        total = 0.0
        for start in range(0, len(batch), size):
            part = collate(batch[start : start + size], pad, device)
            total += float(loss_sum(self.model.model, part))
        return total / sum(sequence.targets for sequence in batch)


def _so_far(pool: SignPool, directions: Sequence[int], scalars: Tensor, step: float) -> Move:
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
