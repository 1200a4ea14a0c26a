"""What is trained of the model, and what it starts from."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config import kinds
from corolla.config.kinds import Kind, KindName
from corolla.config.rule import Rule
from corolla.config.section import Positive
from corolla.config.subject import Subject


class Adapter(Subject):
    """An adapter, or the tensors that are trained in its place."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = Field(
        None, description="None: all linear layers of the blocks"
    )
    ranks: list[Positive] = Field(
        [], description="per client, in turn; needs a mixed-rank strategy"
    )
    alphas: list[Annotated[float, Field(gt=0)]] = Field([], description="per client, beside ranks")

    start: Literal["random", "gradient"] = Field(
        "random", description="of the adapter; gradient: a first step on public rows, by an SVD"
    )
    public: str | None = Field(
        None, description="for start=gradient: .jsonl file with rows that belong to no client"
    )
    public_examples: Positive = Field(64, description="of these rows, at most")

    parameters: KindName = Field(
        kinds.DEFAULT.name,
        description="what is trained: an adapter, or tensors as they are (see dense.py)",
    )
    virtual_tokens: Positive = Field(20, description="of parameters=prompt")

    @property
    def kind(self) -> Kind:
        """What there is to know of the parameters that are trained."""
        return kinds.KINDS[self.parameters]

    @property
    def prefix(self) -> int:
        """Virtual tokens that stand before each text."""
        return self.virtual_tokens if self.kind.virtual_tokens else 0


ALPHAS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.alphas and len(run.alphas) != len(run.ranks),
        why=lambda run: f"alphas has {len(run.alphas)} entries, ranks {len(run.ranks)}",
    ),
)

TARGETS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.target_modules and not run.kind.target_modules,
        why=lambda run: "target-modules are those of adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
)

PUBLIC: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.start == "random" and run.public,
        why=lambda run: f"public={run.public} is for start=gradient",
        instead="leave it out",
    ),
    Rule(
        when=lambda run: run.start == "gradient" and not run.public,
        why=lambda run: "start=gradient needs public=FILE.jsonl",
        instead="rows that belong to no client",
    ),
    Rule(
        when=lambda run: run.start == "gradient" and run.public == run.data,
        why=lambda run: "public rows belong to no client",
        instead="found the file of the clients' data",
    ),
)
