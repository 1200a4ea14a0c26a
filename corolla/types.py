"""The nouns of Corolla and the roles that connect them. No behaviour lives here.

A round: the server broadcasts a payload, each client of the cohort trains and answers with an
Update, an Aggregator folds the updates, the Strategy applies the aggregate to its state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
"""Tensor name → tensor. LoRA factors are `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r);
everything else (a classifier head) keeps its name in the base model."""

Payload = Mapping[str, Params]
"""Group name → Params: what travels, and what a server keeps between rounds.

A group with a tensor "scalars" holds what was measured along seeded directions (see wire.py for
its form): it travels in kilobytes, in the header of a message.
"""

Metrics = Mapping[str, float]
"""Name → number, returned by whoever measured it, never logged."""

Correct = Callable[[Params, Params], Params]
"""Gradient hook of a strategy: (gradients, weights) → gradients, before clipping."""


Aggregates = Literal["weights", "factors", "other"]
"""The effective weights (exact aggregation); the factors A and B apart (FedIT); or neither."""

TrainerName = Literal["first_order", "zeroth_order"]
"""Backpropagation, or forward passes only."""


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
    """What decides the bytes of one client: values of its A factors, B factors and head.

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
    """What the server sends: `payload` each time; a group of `cached` once to each client.

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
    """What a client sends back: differences or factors, never its weights.

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


class LocalTrainer(Protocol):
    """Trains one client's adapter on its own data. It always starts from what it is given."""

    def init(self, seed: int) -> Params:
        """A fresh adapter of this client's rank: A Kaiming-uniform from `seed`, B zero."""

    def fit(
        self,
        start: Params,
        *,
        frozen: Sequence[Params] = (),
        train: Callable[[str], bool] = ...,
        correct: Correct | None = None,
        strength: float = 1.0,
    ) -> Fit:
        """Train the tensors of `start` that `train` selects; `frozen` blocks join the base model.

        The adapter's product counts `strength` times. With tensors `<module>.lora_R` (r, r) in
        `start`, a module's update is scaling · B · R · A and R is trained instead of A.

        Raises DivergedError when the loss is not finite, ValueError when `start` does not cover
        every trainable tensor (a value left by the client before would leak).
        """


class ForwardTrainer(Protocol):
    """Trains with forward passes only, along seeded directions."""

    @property
    def queries(self) -> int:
        """How many directions it measures in a round."""

    def walk(
        self,
        start: Params,
        moves: Sequence[Move],
        pool: Pool,
        directions: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Walk:
        """Take one two-sided step after the other from `start` + `moves`.

        `directions` are those of all queries, in order; each scalar is rounded to `dtype` before
        it moves the weights, so that who receives it can repeat the move.
        """


class Client(Protocol):
    """What a strategy may see of a device during one task."""

    @property
    def seed(self) -> int:
        """A seed of its own for this client and round."""

    @property
    def lora(self) -> LoraSpec:
        """Rank and scaling of this client's adapter."""

    @property
    def population(self) -> int:
        """How many clients the federation has."""

    @property
    def kept(self) -> Payload:
        """What this device kept of its last accepted update (Update.keep); empty before one."""

    @property
    def kind(self) -> TrainerName:
        """How it trains: what its class in the config says, else what the strategy asks for."""

    @property
    def trainer(self) -> LocalTrainer:
        """Its first-order trainer."""

    @property
    def forward(self) -> ForwardTrainer:
        """Its zeroth-order trainer."""


class Aggregator(Protocol):
    """Updates → aggregate. A monoid: any tree of `merge` gives what a flat list of `add` gives."""

    @property
    def linear(self) -> bool:
        """Only sums are needed: secure sums and differential privacy on the sum apply."""

    def add(self, payload: Payload, weight: float) -> None:
        """Fold one client's payload in; `weight` is its number of examples."""

    def merge(self, other: Self) -> None:
        """Fold in what another aggregator has seen."""

    def finalise(self) -> Payload:
        """The aggregate. Raises ValueError when nothing was added."""


@runtime_checkable
class Summable(Aggregator, Protocol):
    """A linear aggregator whose content can travel: a gateway's for a server."""

    def sums(self) -> Payload:
        """What was folded in, in fp64; no tensor is named "scalars"."""

    def sums_like(self, like: Payload) -> Payload:
        """Groups, names, shapes and types of `sums` after updates of the form `like`."""

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        """Fold in the `sums` of updates of the form `like`, which weigh `weight` together.

        Raises ValueError, and changes nothing, for sums that no updates of that weight have.
        """


@runtime_checkable
class Tallied(Summable, Protocol):
    """One whose sums say how much of them is of which class of clients."""

    def tally(self, sums: Payload) -> Mapping[str, tuple[float, float]]:
        """Group of an update → (examples, clients) of those with that group, by their `sums`."""


@runtime_checkable
class Strategy(Protocol):
    """One algorithm, both halves of its paper; hyper-parameters are fields, state is explicit."""

    name: ClassVar[str]
    aggregates: ClassVar[Aggregates]
    """What of the global model is the clients' mean, weighted by examples; `check` proves it."""
    mixed_ranks: ClassVar[bool]
    """Clients may train adapters of different ranks."""
    trainers: ClassVar[tuple[TrainerName, ...]]
    """How its clients may train; the first is the default."""
    full: ClassVar[bool]
    """It can move all parameters of the base model in place instead of training an adapter."""

    def init(self, start: Params, seed: int) -> Payload:
        """The server's first state, from a fresh adapter of the run's rank and the run's seed.

        `start` is empty when all parameters are trained.
        """

    def broadcast(self, state: Payload) -> Broadcast:
        """What every client of the cohort receives."""

    def local(self, client: Client, received: Payload) -> Update:
        """The client half: train and say what to send."""

    def update_like(self, fresh: Params, size: Size) -> Payload:
        """What an update must look like (groups, names, shapes, types), from a fresh adapter.

        `fresh` has the client's rank, `size` says how it trains. The server refuses replies that
        differ. Whole numbers in a vector may lie between 0 and those given here, single numbers
        must be those given here.
        """

    def aggregator(self) -> Aggregator:
        """An empty aggregator for one round."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        """The server half: the next state, and what there is to report about the step."""

    def adapter(self, state: Payload) -> Adapter:
        """The global model of a state; also of a received broadcast, which clients evaluate."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        """Bytes sent and received by each client of a cohort, from the paper's formula."""


@dataclass(frozen=True)
class Traits:
    """What a strategy may say of itself as class attributes of these names; the defaults hold else.

    They decide what it can be combined with (see corolla.config.rules).
    """

    updates: Literal["differences", "factors", "values", "scalars"] = "differences"
    """What travels up: differences of trained tensors; factors with their scaling in A, whose
    products count (group "factors"); trained tensors as they are; scalars."""
    individual: bool = False
    """Single updates are needed or shown to others: no secure sum, no noise on a sum alone."""
    bounded: bool = True
    """Who changes a clipped update moves the next state by a bounded amount: the sum can carry
    the noise of differential privacy."""
    personal: bool = False
    """Clients keep a part of their model: it is evaluated on the clients."""
    keeps: bool = False
    """Clients keep something between rounds (Update.keep)."""
    mirrors: bool = False
    """The server adds up what clients keep: nothing of an update may be changed or left out."""
    rebases: bool = False
    """The coordinates of updates change from round to round: what one leaves out is no part of the
    next (top-k with error feedback)."""
    stale: bool = False
    """An update made from an older state may still be applied (asynchronous aggregation)."""
    dense: bool = False
    """All trained tensors are treated alike: any set of parameters can be trained."""
    optimizers: tuple[str, ...] = ("adamw", "sgd")
    """Local optimisers that its mathematics allow."""
    when: str = ""
    """When to use it, in a sentence."""


@dataclass(frozen=True)
class Observed:
    """One round as it happened, for a strategy that says what it should lead to.

    `spec` is the rank and scaling of the global adapter, `start` its tensors before the round;
    `trained` what each client's model held after local training, `weights` their shares p_m, `lora`
    their ranks and scalings.
    """

    spec: LoraSpec
    start: Params
    trained: Mapping[str, Params]
    weights: Mapping[str, float]
    lora: Mapping[str, LoraSpec]


class Claim(Protocol):
    """What a strategy with aggregates="other" adds, so that `corolla check` has a proof to make."""

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The global adapter's tensors after these rounds, in fp64, at the last round's `spec`.

        Written plainly and not with the code of `apply`: this is the other opinion. Factors are
        compared by their products; those of a personal strategy, which says nothing of the
        tensors that clients keep, as they are.
        """
