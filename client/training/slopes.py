"""Slopes that zeroth-order training measures along its directions, plain or under privacy.

Both kinds have one interface, so that the loop over a round's steps does not know which it has.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from corolla.client.training import dpsgd
from corolla.client.training.padding import filled
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, examples_of
from corolla.directions.pools import SignPool
from corolla.errors import DivergedError
from corolla.host import logs
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.randomness import clip_factors
from corolla.types import Move, Params, Walk

_log = logs.logger("worker")

Batch = Sequence[Sequence[Encoded]]
"""The parts of a step's batch whose slopes are told apart."""


class Scalars:
    """The scalars of a walk, along `directions`, filled step by step."""

    def __init__(
        self,
        count: int,
        dtype: torch.dtype,
        directions: Sequence[int],
        step_size: float,
        answers: bool = False,
    ) -> None:
        """`answers`: an update follows whatever happens; what cannot be used is skipped."""
        self.values = torch.zeros(count, dtype=dtype)
        self.step_size = step_size
        self.skipped = 0
        """Scalars that were not finite, or of a step that is none: they stay 0."""
        self._directions, self._answers = directions, answers

    def take(self, queries: Sequence[int], released: Tensor) -> dict[int, float]:
        """Keeps the scalars of a step; the multiple of each direction that the step moves by.

        Raises DivergedError for a step that is too long to be one, if it does not answer anyhow.
        """
        rounded = released.float().to(self.values.dtype)
        update: dict[int, float] = {}
        for query, g in zip(queries, rounded, strict=True):
            if not bool(torch.isfinite(g)):  # one NaN in a log would be there for ever
                self.skipped += 1
                continue
            self.values[query] = g
            k = int(self._directions[query])
            update[k] = update.get(k, 0.0) + self.step_size * float(g)
        if not all(math.isfinite(scale) and abs(scale) < 1e30 for scale in update.values()):
            if not self._answers:
                raise DivergedError(f"a step of {max(update.values(), key=abs):.1e}: lower lr")
            self.values[list(queries)] = 0.0
            self.skipped += len(queries)
            return {}
        return update

    def so_far(self, pool: SignPool) -> Move:
        """The steps taken until now, as one move."""
        sums = torch.zeros(pool.size, dtype=torch.float64)
        sums.index_add_(0, torch.tensor(self._directions), self.values.double())
        return Move(pool, sums, self.step_size)

    def check(self) -> None:
        """Raises DivergedError when more than half are not finite, if it does not answer anyhow."""
        if 2 * self.skipped > len(self.values):
            why = (
                f"{self.skipped} of {len(self.values)} scalars are not finite in "
                f"{self.values.dtype}: lower lr or raise eps"
            )
            if not self._answers:
                raise DivergedError(why)
            _log.warning("scalars left out", why=why)


class Slopes(Protocol):
    """The slopes of one client in one round: the batches measured, and the scalars released."""

    @property
    def counted(self) -> int:
        """The number of sequences in an epoch; of examples, where privacy keeps the former."""

    def batches(self) -> Iterator[Batch]:
        """The batch of each step."""

    def note(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        """Remembers what was measured on a batch, as far as it may be told."""

    def released(self, slopes: Tensor, batch: Batch) -> Tensor:
        """The scalars (queries,) of a step from the slopes (queries, parts) of a batch."""

    def outcome(self, scalars: Scalars, params: Params, steps: int) -> Walk:
        """The result of a round, with what may be told of it."""


@dataclass
class PlainSlopes:
    """Slopes of the mean loss over the targets of each batch."""

    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    _losses: list[Tensor] = field(default_factory=list)
    _targets: int = 0

    @property
    def counted(self) -> int:
        return len(self.data)

    def batches(self) -> Iterator[Batch]:
        for indices in schedule.batches(self.config, len(self.data), self.seed):
            yield [[self.data[i] for i in indices]]

    def note(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        self._losses += losses
        self._targets += sum(sequence.targets for part in batch for sequence in part)

    def released(self, slopes: Tensor, batch: Batch) -> Tensor:
        return slopes[:, 0]

    def outcome(self, scalars: Scalars, params: Params, steps: int) -> Walk:
        used = [i for at in schedule.batches(self.config, len(self.data), self.seed) for i in at]
        finite = [loss for loss in torch.cat(self._losses).tolist() if math.isfinite(loss)]
        metrics = {
            "train_loss": math.fsum(finite) / len(finite),
            "target_tokens": float(self._targets),
            "local_steps": float(steps),
            "skipped_scalars": float(scalars.skipped),
            "zero_scalars": float((scalars.values == 0).sum()) - scalars.skipped,
            "scalars": float(len(scalars.values)),
        }
        seen = examples_of(self.data, used)
        return Walk(scalars.values, scalars.step_size, params, len(seen), metrics)


@dataclass
class PrivateSlopes:
    """Slopes of each example of a Poisson sample: clipped, summed, noised.

    The vector of an example's slopes in a step is clipped to a norm C, their sum gets noise of
    standard deviation z C in each query and is divided by the expected size of the sample. The
    directions are public, so that these scalars are all there is to protect; what is made of them
    is private as they are. Each example is measured by itself: beside others of other lengths its
    loss would round differently, and divided by 2 eps that is no longer nothing. Of a user, whose
    records are one example, the slopes of each record are measured and summed: the slope of the sum
    of their losses. In the place of a record of which nothing is left a blank is measured, so that
    the work depends on the number of records alone.
    """

    data: Sequence[Encoded]
    private: ExampleLevel
    blank: Encoded

    @property
    def counted(self) -> int:
        return self.private.examples

    def batches(self) -> Iterator[Batch]:
        known = dpsgd.examples(self.data, self.private.examples)
        for drawn in dpsgd.batches(self.private, known):
            yield [record for own in drawn for record in dpsgd.records(filled(own, self.blank))]

    def note(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        """Nothing of it may be told."""

    def released(self, slopes: Tensor, batch: Batch) -> Tensor:
        """In units of the clip until the noise is on them: see dpsgd.py."""
        slopes, clip = _by_unit(slopes, batch), self.private.clip
        factors = clip_factors(slopes.norm(dim=0) / clip, 1.0) / clip
        clipped = torch.where(factors > 0, factors * slopes, 0.0)  # 0 · NaN is NaN
        return self.private.noised({"slopes": clipped.sum(1)})["slopes"]

    def outcome(self, scalars: Scalars, params: Params, steps: int) -> Walk:
        public = min(self.private.examples, steps * self.private.batch)
        metrics = {"local_steps": float(steps)}
        return Walk(scalars.values, scalars.step_size, params, public, metrics)


def _by_unit(slopes: Tensor, batch: Batch) -> Tensor:
    """Sums over the records of each user (queries, users), from slopes (queries, records)."""
    # What is of no user, a blank among them, is a unit of its own.
    users = [
        (0, i) if record[0].unit is None else (1, record[0].unit) for i, record in enumerate(batch)
    ]
    place = {unit: i for i, unit in enumerate(dict.fromkeys(users))}
    if len(place) == len(users):  # as they are: a sum may lose the sign of a zero
        return slopes
    index = torch.tensor([place[unit] for unit in users])
    return slopes.new_zeros(len(slopes), len(place)).index_add_(1, index, slopes)
