"""The nouns of Corolla and the roles that connect them. No behaviour lives here.

A round: the server broadcasts a payload, each client of the cohort trains and answers with an
Update, an Aggregator folds the updates, the Strategy applies the aggregate to its state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

from torch import Tensor

Params = Mapping[str, Tensor]
"""Tensor name → tensor. LoRA factors are `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r);
everything else (a classifier head) keeps its name in the base model."""

Payload = Mapping[str, Params]
"""Group name → Params: what travels, and what a server keeps between rounds."""

Metrics = Mapping[str, float]
"""Name → number, returned by whoever measured it, never logged."""

Correct = Callable[[Params, Params], Params]
"""Gradient hook of a strategy: (gradients, weights) → gradients, before clipping."""


Aggregates = Literal["weights", "factors", "other"]
"""The effective weights (exact aggregation); the factors A and B apart (FedIT); or neither."""


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
    """How many values one client's adapter has: all A factors, all B factors, the head."""

    A: int
    B: int
    head: int = 0


@dataclass(frozen=True)
class Cost:
    """Values one client sends and receives in a round; `once`: received in its first one."""

    up: int
    down: int
    once: int = 0


@dataclass(frozen=True)
class Adapter:
    """A global model as the server knows it, relative to the base model.

    `trained` holds factors at the run's LoraSpec, and the head; `frozen` holds stacked low-rank
    blocks whose scaling is 1 (weights and alpha / rank are baked into A).
    """

    trained: Params
    frozen: tuple[Params, ...] = ()


@dataclass(frozen=True)
class Broadcast:
    """What the server sends: `payload` each time; a group of `cached` once to each client.

    The client sees one payload with the groups of both.
    """

    payload: Payload
    cached: Payload = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a client sends back: differences or factors, never its weights.

    `num_examples` counts the distinct examples that were trained on: the weight of the update.
    """

    payload: Payload
    num_examples: int
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """The outcome of local training: all trainable tensors afterwards, and what it took."""

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
    ) -> Fit:
        """Train the tensors of `start` that `train` selects; `frozen` blocks join the base model.

        Raises DivergedError when the loss is not finite, ValueError when `start` does not cover
        every trainable tensor (a value left by the client before would leak).
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
    def trainer(self) -> LocalTrainer:
        """Its trainer."""


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
class Strategy(Protocol):
    """One algorithm, both halves of its paper; hyper-parameters are fields, state is explicit."""

    name: ClassVar[str]
    aggregates: ClassVar[Aggregates]
    """What of the global model is the clients' mean, weighted by examples; `check` proves it."""
    mixed_ranks: ClassVar[bool]
    """Clients may train adapters of different ranks."""

    def init(self, start: Params) -> Payload:
        """The server's first state, from a fresh adapter of the run's rank."""

    def broadcast(self, state: Payload) -> Broadcast:
        """What every client of the cohort receives."""

    def local(self, client: Client, received: Payload) -> Update:
        """The client half: train and say what to send."""

    def update_like(self, fresh: Params) -> Payload:
        """What an update must look like (groups, names, shapes, types), from a fresh adapter.

        `fresh` has the client's rank. The server refuses replies that differ.
        """

    def aggregator(self) -> Aggregator:
        """An empty aggregator for one round."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        """The server half: the next state, and what there is to report about the step."""

    def adapter(self, state: Payload) -> Adapter:
        """The global model of a state; also of a received broadcast, which clients evaluate."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        """Values sent and received by each client of a cohort, from the paper's formula."""
