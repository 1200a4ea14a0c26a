"""How clients train: all of them, and classes of clients that differ."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections import learning_rates
from corolla.config.sections.adapter import Adapter
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.rule import Rule
from corolla.config.sections.section import Positive, key, within
from corolla.types import LoraSpec


class Training(Adapter):
    """Steps, rates and directions."""

    classes: dict[str, ClientClass] = key(
        {},
        "Classes of clients by name, each with settings of its own (classes.NAME.KEY); clients "
        "take them in turn, by their shares.",
        {"phone": {"share": 2, "lr": 0.001}, "laptop": {}},
        effect="none: all clients are alike",
    )

    optimizer: Literal["adamw", "sgd"] = key(
        "adamw",
        "The optimiser of first-order local steps.",
        "sgd",
        beside="strategy=scaffold lr=0.1",
        against=("optimizer=adamw",),
    )
    lr: Annotated[float, within("lr")] = key(
        3e-4, "The learning rate of local steps.", 1e-3, effect=learning_rates.in_words()
    )
    queries: Annotated[int, within("queries")] = key(
        1,
        "The number of directions that a zeroth-order step measures.",
        4,
        beside="strategy=seed_pool",
        against=("local_steps=20000",),
    )
    estimator: Literal["two_sided", "kerzoo"] = key(
        "two_sided",
        "How a zeroth-order step estimates a slope: by a two-sided difference, or with the kernel "
        "of KerZOO.",
        "kerzoo",
        beside="strategy=seed_pool",
    )
    eps: Annotated[float, within("eps")] = key(
        1e-3,
        "The distance along a direction at which a zeroth-order step looks, both ways.",
        1e-2,
        beside="strategy=seed_pool",
    )
    weight_decay: Annotated[float, within("weight_decay")] = key(
        0.0, "The weight decay of the optimiser.", 0.01
    )
    local_steps: Annotated[int, within("local_steps")] = key(
        10,
        "The number of optimiser steps that a client takes in a round.",
        20,
        effect="10, or 50 where all clients are zeroth order",
        against=("strategy=seed_pool queries=10000",),
    )
    local_epochs: Annotated[int, within("local_epochs")] | None = key(
        None,
        "The number of passes that a client makes over its data in a round, instead of "
        "local_steps.",
        1,
        effect="none: local_steps counts",
        against=("strategy=seed_pool",),
    )
    keep_hardest: Annotated[float, Field(gt=0, le=1)] | None = key(
        None,
        "The share of a client's sequences that it trains on in a round: those that the received "
        "model predicts worst (EL2N).",
        0.5,
        effect="all of them",
        against=("dp=example epsilon=8", "strategy=seed_pool"),
        unsaid=True,
    )
    batch_size: Annotated[int, within("batch_size")] = key(
        8, "The number of sequences of a local step.", 16
    )
    micro_batch_size: Positive | None = key(
        None,
        "The number of sequences that are computed at a time, at most: fewer take less memory.",
        2,
        effect="batch_size; first-order steps on a CPU part a batch by length, where that saves "
        "padding",
        against=("batch_size=1",),
    )
    schedule: Literal["constant", "linear", "cosine"] = key(
        "cosine", "How the learning rate falls across all rounds.", "linear"
    )
    warmup_rounds: Annotated[float, within("warmup_rounds")] = key(
        0.0, "The number of rounds, also a part of one, in which the rate rises to lr.", 0.5
    )
    clip_norm: Annotated[float, within("clip_norm")] | None = key(
        1.0,
        "The L2 norm that the gradient of a local step is clipped to; null does not clip.",
        0.5,
        effect="1.0, or null with dp=example, which clips by itself",
    )

    @property
    def classes_with_ranks(self) -> list[str]:
        """Classes whose adapters have a rank or a scaling of their own."""
        return [name for name, own in self.classes.items() if own.rank or own.alpha]

    def class_of(self, index: int) -> str:
        """The class of the index-th client, in the order of client ids; "" without classes."""
        turns = [name for name, own in self.classes.items() for _ in range(own.share)]
        return turns[index % len(turns)] if turns else ""

    @property
    def lora(self) -> LoraSpec:
        """Rank and scaling of the global adapter: those of the client with the largest rank."""
        return max(self.loras, key=lambda spec: spec.rank)

    @property
    def loras(self) -> list[LoraSpec]:
        """Ranks and scalings that clients have: those of `ranks`, in turn, or of each class."""
        if self.ranks:
            alphas = self.alphas or [self.alpha] * len(self.ranks)
            pairs = list(zip(self.ranks, alphas, strict=True))
        else:
            classes = self.classes.values() or [ClientClass()]
            pairs = [(own.rank or self.rank, own.alpha or self.alpha) for own in classes]
        return [LoraSpec(rank, alpha, self.rslora) for rank, alpha in pairs]

    def client_lora(self, index: int) -> LoraSpec:
        """Rank and scaling of the index-th client, in the order of client ids."""
        if self.ranks or not self.classes:
            return self.loras[index % len(self.loras)]
        return self.loras[list(self.classes).index(self.class_of(index))]


MICRO_BATCH: tuple[Rule[Training], ...] = (
    Rule(
        when=lambda run: (run.micro_batch_size or 1) > run.batch_size,
        why=lambda run: (
            f"micro_batch_size {run.micro_batch_size} is larger than batch_size {run.batch_size}"
        ),
    ),
)

RANKS: tuple[Rule[Training], ...] = (
    Rule(
        when=lambda run: run.ranks and run.classes_with_ranks,
        why=lambda run: f"ranks go by client and by class (classes.{run.classes_with_ranks[0]})",
        instead="give one of them",
    ),
)

RANKS_OF_ADAPTERS: tuple[Rule[Training], ...] = (
    Rule(
        when=lambda run: (run.ranks or run.classes_with_ranks) and not run.kind.factors,
        why=lambda run: "ranks are those of adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
)
