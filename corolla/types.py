"""The nouns of Corolla and the roles that connect them. No behaviour lives here.

A round: the server broadcasts a payload, each client of the cohort trains and answers with an
Update, an Aggregator folds the updates, the Strategy applies the aggregate to its state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # settings need some of these nouns, and a command's help no torch
    from torch import Tensor

Params = Mapping[str, "Tensor"]
"""Tensor name → tensor. LoRA factors are `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r);
everything else (a classifier head) keeps its name in the base model."""

Payload = Mapping[str, Params]
"""Group name → Params: what travels, and what a server keeps between rounds.

A group with a tensor "scalars" holds what was measured along seeded directions (see
wire/scalar_groups.py): it travels in kilobytes, in the header of a message.
"""

Metrics = Mapping[str, float]

PER_USER = "per_user"
"""The metric with which a client says, by 1, that its epsilon is of users, not of examples."""
"""Name → number, returned by whoever measured it, never logged."""

Correct = Callable[[Params, Params], Params]
"""Gradient hook of a strategy: (gradients, weights) → gradients, before clipping."""


Aggregates = Literal["weights", "factors", "other"]
"""The effective weights (exact aggregation); the factors A and B apart (FedIT); or neither."""

TrainerName = Literal["first_order", "zeroth_order"]
"""Backpropagation, or forward passes only."""

RobustRule = Literal["median", "trimmed_mean", "norm_clip", "krum", "multi_krum"]
"""How a round is defended against hostile clients."""

Space = Literal["tensors", "products"]
"""The space in which updates are compared: tensor by tensor, or by products of their factors."""


@dataclass(frozen=True)
class LoraSpec:
    """Rank and scaling of one adapter: the effective update of a module is scaling · B · A.

    scaling is alpha / rank (Hu et al., ICLR 2022, arXiv 2106.09685), or alpha / sqrt(rank) with
    rank stabilisation (Kalajdzievski, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B · A in the effective update."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


@dataclass(frozen=True)
class Size:
    """The facts that decide the bytes of one client: values of its A factors, B factors and head.

    `scalars` is how many directions a zeroth-order client measures in a round, `seed` its seed and
    `step` the -lr / queries that it multiplies them by. `round` counts from 1. `rank` is that
    of the adapter, on so many `modules`.
    """

    A: int
    B: int
    head: int = 0
    scalars: int = 0
    trainer: TrainerName = "first_order"
    seed: int = 0
    step: float = 0.0
    round: int = 1
    rank: int = 0
    modules: int = 0
    part: Size | None = None
    """The size of what the client trains of the adapter, where that is some blocks alone."""
    chosen: Sequence[str] = ()
    """The units that are trained in the round, where the strategy is Choosing; empty: not known."""

    @property
    def trained(self) -> Size:
        """The size of what the client trains."""
        return self.part or self

    @property
    def values(self) -> int:
        """All values of the adapter and the head."""
        return self.A + self.B + self.head


@dataclass(frozen=True)
class Cost:
    """Bytes one client sends and receives in a round; `once`: received in its first one.

    With `at_most` they are limits: scalars of which many are 0 are sent sparse. Who missed rounds
    of a log receives `down` for each.
    """

    up: int
    down: int
    once: int = 0
    at_most: bool = False


class Pool(Protocol):
    """Seeded directions z_0, z_1, … of one flat vector: all trained tensors, sorted by name."""

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        """`out` = `source` (default: itself) + Σ_j scale_j · z_{k_j}[offset : offset + n].

        `terms` holds (k_j, scale_j), added in this order in fp32; `out` and `source` are
        contiguous, of n values and of one type.
        """


@dataclass(frozen=True)
class Move:
    """A step along seeded directions: w ← w + step · Σ_k scalars[k] · z_k, in canonical order."""

    pool: Pool
    scalars: Tensor
    step: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """A global model as the server knows it, relative to the base model.

    `trained` holds factors at the run's LoraSpec, and the head; `frozen` holds stacked low-rank
    blocks whose scaling is 1 (weights and alpha / rank are baked into A), `residuals` such blocks
    at the scaling of the run's LoraSpec. `moves` are made from `trained`; where that is empty (all
    parameters are trained), from the base weights themselves.
    """

    trained: Params
    frozen: tuple[Params, ...] = ()
    moves: tuple[Move, ...] = ()
    residuals: tuple[Params, ...] = ()


@dataclass(frozen=True)
class Broadcast:
    """The payloads a server sends: `payload` each time; a group of `cached` once to each client.

    The client sees one payload with the groups of all. With `log`, it also sees the groups of
    `Strategy.init`, which it makes itself from the run's seed, and one group a row, named by
    `row_name`: a client receives only the rows it lacks, or, where that is fewer bytes,
    `snapshot()` instead of the group "start" and all rows so far. `fitted` gives further groups,
    made for the rank and scaling of one client.
    """

    payload: Payload
    cached: Payload = field(default_factory=dict)
    log: Sequence[Params] | None = None
    snapshot: Callable[[], Params] | None = None
    fitted: Callable[[LoraSpec], Payload] | None = None


def row_name(number: int) -> str:
    """The group of the number-th row of a log, from 1."""
    return f"log-{number:06d}"


@dataclass(frozen=True)
class Update:
    """The update that a client sends back: differences, factors, trained tensors or scalars.

    `num_examples` counts the distinct examples that were trained on: the weight of the update.
    `keep` never leaves the device: it becomes `Client.kept` if the server accepts the update.
    """

    payload: Payload
    num_examples: int
    metrics: Metrics = field(default_factory=dict)
    keep: Payload = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """The outcome of local training: all trainable tensors afterwards, and what it took.

    `distance` is the sum of the learning rates of its steps: with SGD, `start - params` is the
    mean gradient times it.
    """

    params: Params
    num_examples: int
    metrics: Metrics
    distance: float = 0.0


@dataclass(frozen=True)
class Walk:
    """The outcome of zeroth-order training: the scalars in the order of the queries.

    The client has moved its weights by step · Σ_t scalars[t] · z_{k_t}; a scalar that was not
    finite is 0. `params` are the LoRA tensors afterwards, empty when all parameters are trained.
    """

    scalars: Tensor
    step: float
    params: Params
    num_examples: int
    metrics: Metrics
