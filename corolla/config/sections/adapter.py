"""The part of the model that is trained, and what it starts from."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections import kinds
from corolla.config.sections.kinds import Kind, KindName
from corolla.config.sections.rule import Rule
from corolla.config.sections.section import Layers, Positive, key, within
from corolla.config.sections.subject import Subject


class Adapter(Subject):
    """An adapter, or the tensors that are trained in its place."""

    rank: Annotated[int, within("rank")] = key(8, "The rank of LoRA adapters.", 16)
    alpha: Annotated[float, within("alpha")] = key(
        16.0, "The numerator of LoRA's scaling, alpha / rank.", 32.0
    )
    rslora: bool = key(
        False, "Whether the scaling is alpha / sqrt(rank), which is stable for large ranks.", True
    )
    served_rank: Annotated[int, within("rank")] = key(
        64,
        "The largest rank of the adapter that a run writes for servers of models; where the exact "
        "one is larger, the best of this rank lies in served/.",
        32,
    )
    max_rank: Annotated[int, within("rank")] | None = key(
        None,
        "The largest rank of the state of a strategy that stacks factors: after each round it "
        "becomes the best one of this rank, and the error is told.",
        16,
        effect="none, nothing is cut",
        beside="strategy=flora",
        against=("strategy=fedex_lora rank=32",),
        unsaid=True,
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "The probability with which an input of an adapter is dropped in training.", 0.05
    )
    target_modules: list[str] | None = key(
        None,
        "The names of the linear layers that get an adapter.",
        ["q_proj", "v_proj"],
        effect="all linear layers of the blocks",
        against=("parameters=bias",),
    )
    layers: Layers | None = key(
        None,
        "The blocks of the model that get an adapter, counted from 0 at the input: `last:4`, "
        "`first:2,last:2`, `0,3,17-23`. A backward pass ends at the deepest of them.",
        "last:4",
        effect="all blocks",
        against=("parameters=bias",),
        unsaid=True,
    )
    rank_pattern: dict[str, Annotated[int, within("rank")]] = key(
        {},
        "The ranks of single modules, by their names or the last parts of them.",
        {"q_proj": 4},
        effect="rank, in all modules",
        against=("parameters=bias", "strategy=flora", "start=gradient public=public.jsonl"),
        unsaid=True,
    )
    alpha_pattern: dict[str, Annotated[float, within("alpha")]] = key(
        {},
        "The numerators of the scalings of single modules, by their names or the last parts of "
        "them.",
        {"q_proj": 8.0},
        effect="alpha, in all modules",
        against=("parameters=bias", "strategy=flora"),
        unsaid=True,
    )
    ranks: list[Annotated[int, within("rank")]] = key(
        [],
        "The ranks of clients' adapters, which clients take in turn.",
        [4, 8],
        effect="rank, for all clients",
        beside="strategy=flora",
        against=("strategy=fedavg", "classes.phone.rank=4", "strategy=fedavg parameters=bias"),
    )
    alphas: list[Annotated[float, within("alpha")]] = key(
        [],
        "The numerators of clients' scalings, one for each of ranks.",
        [8.0, 16.0],
        effect="alpha, for all clients",
        beside="strategy=flora ranks=[4,8]",
        against=("ranks=[4]",),
    )

    start: Literal["random", "gradient"] = key(
        "random",
        "What the adapter begins as: random factors, or the best factors of a first step on public "
        "rows.",
        "gradient",
        beside="public=public.jsonl",
        against=("public=null", "strategy=flora", "parameters=bias", "quantization=4bit"),
    )
    public: str | None = key(
        None,
        "A .jsonl file of rows that belong to no client, for start=gradient.",
        "public.jsonl",
        effect="none",
        beside="start=gradient",
        against=("start=random", "data=public.jsonl"),
    )
    public_examples: Positive = key(
        64,
        "The number of public rows that are used at most.",
        128,
        beside="start=gradient public=public.jsonl",
    )

    parameters: KindName = key(
        kinds.DEFAULT.name,
        "What is trained: an adapter (lora, ia3, prompt), or tensors of the model as they are "
        "(bias, norm, head, full).",
        "ia3",
        against=("strategy=flora", "quantization=4bit", "dp=example epsilon=8"),
    )
    virtual_tokens: Positive = key(
        20,
        "The number of tokens before the text whose embeddings are trained.",
        10,
        beside="parameters=prompt",
    )

    @property
    def kind(self) -> Kind:
        """The kind of the parameters that are trained, with its facts and defaults."""
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

PATTERNS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: (run.rank_pattern or run.alpha_pattern) and not run.kind.factors,
        why=lambda run: "rank-pattern and alpha-pattern are those of LoRA adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: (run.rank_pattern or run.alpha_pattern) and run.start != "random",
        why=lambda run: (
            f"rank-pattern and alpha-pattern are for random factors, found start={run.start}"
        ),
        instead="leave them out, or start",
    ),
)

TARGETS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.target_modules and not run.kind.target_modules,
        why=lambda run: "target-modules are those of adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.layers and not run.kind.factors,
        why=lambda run: "layers are those of LoRA adapters",
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
