"""How clients train: all of them, and classes of clients that differ."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.adapter import Adapter
from corolla.config.groups import ClientClass
from corolla.config.rule import Rule
from corolla.config.section import Positive
from corolla.types import LoraSpec


class Training(Adapter):
    """Steps, rates and directions."""

    classes: dict[str, ClientClass] = Field(
        {}, description="classes of clients by name; clients take them in turn, by their shares"
    )

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = Field(
        3e-4,
        description="3e-3 for the embedded model; see corolla/config/kinds.py",
    )
    queries: Positive = Field(1, description="directions a zeroth-order step measures")
    estimator: Literal["two_sided", "kerzoo"] = Field(
        "two_sided", description="how a zeroth-order step estimates a slope"
    )
    eps: Annotated[float, Field(ge=1e-20)] = Field(
        1e-3, description="how far along a direction a zeroth-order step looks, both ways"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    local_steps: Positive = Field(10, description="50 where all clients are zeroth order")
    local_epochs: Positive | None = Field(None, description="instead of local_steps")
    batch_size: Positive = 8
    micro_batch_size: Positive | None = Field(None, description="None: batch_size")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="across rounds")
    warmup_rounds: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="L2 norm of a step's gradient; None with dp=example, which has its own"
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
