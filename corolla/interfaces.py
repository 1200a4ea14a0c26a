"""The roles of a federation as protocols: trainers, clients, aggregators and strategies."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

import torch

from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Correct,
    Cost,
    Fit,
    LoraSpec,
    Metrics,
    Move,
    Params,
    Payload,
    Pool,
    Size,
    TrainerName,
    Update,
    Walk,
)


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
    """A device as a strategy may see it during one task."""

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
        """The payload kept of the device's last accepted update (Update.keep); empty before."""

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
        """Fold one client's payload in; `weight` is the distinct examples that it trained on."""

    def merge(self, other: Self) -> None:
        """Fold in what another aggregator has seen."""

    def finalise(self) -> Payload:
        """The aggregate. Raises ValueError when nothing was added."""


@runtime_checkable
class Summable(Aggregator, Protocol):
    """A linear aggregator whose content can travel: a gateway's for a server."""

    def sums(self) -> Payload:
        """Returns the sums of all that was folded in, in fp64; no tensor is named "scalars"."""

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
    """The part of the global model that is the clients' mean, weighted by the distinct examples
    that each trained on in the round; `check` proves it."""
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
        """Returns the broadcast that every client of the cohort receives."""

    def local(self, client: Client, received: Payload) -> Update:
        """The client half: train and say what to send."""

    def update_like(self, fresh: Params, size: Size) -> Payload:
        """Returns the form of every update (groups, names, shapes, types), from a fresh adapter.

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
    """The traits that a strategy may state, as class attributes of these names; else defaults hold.

    They decide what it can be combined with (see corolla.config.rules).
    """

    updates: Literal["differences", "factors", "values", "scalars"] = "differences"
    """The kind of values that an update carries on its way up.

    Differences of trained tensors; factors with their scaling in A, whose products count (group
    "factors"); trained tensors as they are; scalars.
    """
    individual: bool = False
    """Single updates are needed or shown to others: no secure sum, no noise on a sum alone."""
    bounded: bool = True
    """True where a change of one clipped update moves the next state by a bounded amount.

    The sum can then carry the noise of differential privacy.
    """
    squares: bool = False
    """Updates hold squared gradients of batches: all clients need one size of batches, and few bits
    or a bound on a norm would not mean what they mean for differences."""
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
    partial: Literal["", "absent", "sent"] = ""
    """How an update says that some blocks were not trained; "" where it cannot.

    Without their tensors, where the aggregate takes these for no change; or with them as they were.
    Of no use where clients keep a part of the model, or coordinates change from round to round.
    """
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
    `trained` what each client's model held after local training, `weights` their shares p_m of all
    examples, `lora` their ranks and scalings. `state` is what the server kept before the round,
    `updates` what each client sent.
    """

    spec: LoraSpec
    start: Params
    trained: Mapping[str, Params]
    weights: Mapping[str, float]
    lora: Mapping[str, LoraSpec]
    state: Payload = field(default_factory=dict)
    updates: Mapping[str, Payload] = field(default_factory=dict)


@runtime_checkable
class PricedByState(Protocol):
    """The price of a strategy whose broadcasts are now and then of another size."""

    def cost_from(self, state: Payload, cohort: Sequence[Size]) -> Sequence[Cost]:
        """As `Strategy.cost`, for a round that starts from `state`."""


@runtime_checkable
class Choosing(Protocol):
    """A strategy whose clients train other tensors in each round, as its state says.

    It takes an aggregate without a tensor for no change of it.
    """

    def chosen(self, state: Payload) -> Sequence[str]:
        """Names of the units that clients train in the round that begins from `state`.

        The form of updates follows from them (Size.chosen). Raises ConfigError without any.
        """

    def most(self, names: Collection[str], number: int) -> tuple[Sequence[int], Sequence[str]]:
        """The blocks, of so many, and tensors that take most memory of a client in a round.

        `names` are those of all trained tensors. Blocks that are drawn are not known before: the
        deepest have the longest backward pass.
        """


@runtime_checkable
class Stacking(Protocol):
    """A strategy that stacks factors: the rank of its model grows with each round."""

    def rank_after(self, rounds: int, cohort: Sequence[Size]) -> int:
        """The rank of the factors after so many rounds of such cohorts, where nothing is cut."""

    def cut(self, state: Payload, rank: int) -> tuple[Payload, Metrics]:
        """The state of the best model of rank at most `rank`, for the key `max_rank`.

        Module by module the truncated SVD of the effective update (Eckart and Young), from its
        factors in fp64. Reports "rank_error", ‖before - after‖_F / ‖before‖_F over all modules; a
        state of no larger rank stays as it is, bit for bit, with an error of 0.
        """


class Claim(Protocol):
    """The claims that a strategy may add for `corolla check` to prove; each may be left out.

    Whoever aggregates "other" adds `expected`: without it nothing of the aggregate is proven.
    """

    weighted: bool
    """A client counts by its number of examples (the default). Where it does not, `expected` or
    `shares` says how it counts."""
    exact: bool
    """The mean in `aggregates` is taken with these options (the default). Where it is not, because
    an option cuts ranks, `expected` says what comes out."""
    rounding: float
    """By how much an aggregate may be off, relative to a step, because it travels in few bits."""

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The global adapter's tensors after these rounds, in fp64, at the last round's `spec`.

        Written plainly and not with the code of `apply`: this is the other opinion. Factors are
        compared by their products; those of a personal strategy, which says nothing of the
        tensors that clients keep, as they are.
        """

    def shares(self, observed: Observed) -> Mapping[str, float]:
        """Each client's share in the mean of a round, where it is not that of its examples."""
