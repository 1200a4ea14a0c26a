"""The part of the model that is trained, and what it starts from."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from corolla.config.sections import kinds, starts
from corolla.config.sections.kinds import Kind, KindName
from corolla.config.sections.rule import Rule
from corolla.config.sections.section import Budget, Layers, Positive, key, within
from corolla.config.sections.sparse_set import READS_ROWS, SparseSet
from corolla.config.sections.starts import Start


class Adapter(SparseSet):
    """An adapter, or the tensors that are trained in its place."""

    rank: Annotated[int, within("rank")] = key(8, "The rank of LoRA adapters.", 16)
    alpha: Annotated[float, within("alpha")] = key(
        16.0, "The numerator of LoRA's scaling, alpha / rank.", 32.0
    )
    rslora: bool = key(
        False, "Whether the scaling is alpha / sqrt(rank), which is stable for large ranks.", True
    )
    dora: bool = key(
        False,
        "Whether modules have magnitudes beside their factors (DoRA): the lengths of the rows of a "
        "weight are trained apart from its directions. Averaged apart, they are not the mean of "
        "weights: `corolla check` says how far off.",
        True,
        against=(
            *("parameters=bias", "strategy=flora", "strategy=ffa_lora", "quantization=4bit"),
            *("start=pissa", 'codec_down=["top_k:0.25"]', "budget=flops:0.5"),
            'target_parameters=["experts.down_proj"]',
        ),
        unsaid=True,
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
    target_parameters: list[str] | None = key(
        None,
        "The names of tensors that hold the weights of all experts of a layer, and get an adapter "
        "for each expert beside those of linear layers (Mixtral, Qwen3-MoE, gpt-oss).",
        ["experts.gate_up_proj", "experts.down_proj"],
        effect="none, fused experts stay as they are",
        against=(
            *("parameters=bias", "dropout=0.1", "quantization=4bit"),
            *("start=gradient public=public.jsonl", "budget=flops:0.5"),
        ),
        unsaid=True,
    )
    new_tokens: list[Annotated[str, Field(min_length=1)]] = key(
        [],
        "Tokens of the data's own, which the tokenizer gets where it lacks them; their rows of the "
        "tables of embeddings are trained beside the adapter.",
        ["<tool>", "</tool>"],
        effect="none",
        against=(
            *("parameters=bias", "quantization=4bit", "strategy=fedsa_lora", "start=pissa"),
            'new_tokens=["<a>","<a>"]',
        ),
        unsaid=True,
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
    budget: Budget | None = key(
        None,
        "The share of what training all modules takes that training may take: `flops:0.5` of the "
        "backward pass, `bytes:0.25` of an update, `memory:0.5` of what the choice decides of the "
        "peak. The best modules within it are chosen before the first round, on `public` rows if "
        "these are given, and run.json says them as `layers` or `target_modules`.",
        "flops:0.5",
        effect="none, all are trained",
        against=("parameters=bias", "strategy=seed_pool", "ranks=[4,8]"),
        unsaid=True,
    )
    scores: Literal["gain", "sensitivity"] = key(
        "gain",
        "What a module is worth under a budget, on `public` rows: what a first step on all of them "
        "gains, or how much the loss depends on its values in steps over them (AdaLoRA).",
        "sensitivity",
        beside="budget=flops:0.6 public=public.jsonl",
        against=("public=null", "budget=null"),
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

    start: Annotated[str, AfterValidator(starts.checked)] = key(
        "random",
        "What the adapter begins as: random factors, factors made of the base's weights (pissa, "
        "pissa_N, olora, mica, channels, channels_large, channels_small, loftq) or of none "
        "(orthogonal), of gradients (gradient, lora_ga) or inputs (corda_ipm, corda_kpm, eva) on "
        "public rows, or a FOLDER with an adapter to go on from. See docs/starts.md.",
        "pissa",
        against=(
            "strategy=flora",
            "parameters=bias",
            "quantization=4bit",
            "public=public.jsonl",
            "weight_decay=0.01",
        ),
    )
    public: str | None = key(
        None,
        "A .jsonl file of rows that belong to no client, for a start that is made from them, for "
        "budget, for select=fisher or gradient, and for regrow.",
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
        "What is trained: an adapter (lora, ia3, prompt), tensors of the model as they are (bias, "
        "norm, head, embeddings, full), or values at places of its weight matrices (sparse).",
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
    def plain_lora(self) -> bool:
        """True where all that is trained, but for a head, is LoRA of linear layers."""
        more = self.target_parameters or self.new_tokens or self.dora
        return self.kind.factors and not more

    @property
    def kind(self) -> Kind:
        """The kind of the parameters that are trained, with its facts and defaults."""
        return kinds.KINDS[self.parameters]

    @property
    def budgeted(self) -> bool:
        """True where blocks or modules are still to be chosen under a budget."""
        return self.budget is not None

    @property
    def begins(self) -> Start:
        """The start of the adapter, with its facts."""
        return starts.of(self.start)

    @property
    def reads_public(self) -> bool:
        """True where public rows are read, if there are any."""
        return self.begins.rows or self.budgeted or self.selects_by_rows

    @property
    def patterned(self) -> bool:
        """True where modules have ranks or scalings of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def prefix(self) -> int:
        """Virtual tokens that stand before each text."""
        return self.virtual_tokens if self.kind.virtual_tokens else 0


SELECTION: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.select != "random" and not run.kind.sparse,
        why=lambda run: f"select={run.select} is for parameters=sparse",
        instead=lambda run: f"found parameters={run.parameters}, leave it out",
    ),
    Rule(
        when=lambda run: run.regrow and not run.kind.sparse,
        why=lambda run: f"regrow={run.regrow} is for parameters=sparse",
        instead=lambda run: f"found parameters={run.parameters}, leave it out",
    ),
    Rule(
        when=lambda run: run.regrow and not run.public,
        why=lambda run: f"regrow={run.regrow} needs public=FILE.jsonl",
        instead="rows that belong to no client",
    ),
    Rule(
        when=lambda run: run.explored and run.select != "movement",
        why=lambda run: f"explored={run.explored} is for select=movement",
        instead=lambda run: f"found select={run.select}",
    ),
    Rule(
        when=lambda run: run.select == "movement" and not run.explored,
        why=lambda run: "select=movement needs explored=FOLDER",
        instead="a LoRA adapter of the same base, as a run before has saved it",
    ),
    Rule(
        when=lambda run: run.selects_by_rows and not run.public,
        why=lambda run: f"select={run.select} needs public=FILE.jsonl",
        instead="rows that belong to no client",
    ),
)

ALPHAS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.alphas and len(run.alphas) != len(run.ranks),
        why=lambda run: f"alphas has {len(run.alphas)} entries, ranks {len(run.ranks)}",
    ),
)

DORA: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.dora and not run.kind.factors,
        why=lambda run: "dora has magnitudes beside LoRA factors",
        instead=lambda run: f"parameters={run.parameters} has none, leave one of the two out",
    ),
    Rule(
        when=lambda run: run.dora and not run.begins.still,
        why=lambda run: (
            f"dora begins with the magnitudes of the base, which start={run.start} leaves or moves"
        ),
        instead=f"use start={starts.still()}",
    ),
    Rule(
        when=lambda run: run.dora and run.target_parameters,
        why=lambda run: (
            "dora has magnitudes of linear layers, and experts of target-parameters "
            "have none in peft"
        ),
        instead="leave one of the two out",
    ),
    Rule(
        when=lambda run: run.dora and run.budgeted,
        why=lambda run: "budget chooses by what LoRA takes, and dora takes more",
        instead="set layers or target-modules",
    ),
)

PATTERNS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.patterned and not run.kind.factors,
        why=lambda run: "rank-pattern and alpha-pattern are those of LoRA adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.patterned and run.start != "random",
        why=lambda run: (
            f"rank-pattern and alpha-pattern are for random factors, found start={run.start}"
        ),
        instead="leave them out, or start",
    ),
    Rule(
        when=lambda run: run.patterned and run.budgeted,
        why=lambda run: "budget is for modules of one rank",
        instead="leave rank-pattern and alpha-pattern out, or budget",
    ),
)

TARGETS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.target_modules and not run.kind.target_modules,
        why=lambda run: "target-modules are those of adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.target_parameters and not run.kind.factors,
        why=lambda run: "target-parameters get LoRA adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.target_parameters and run.dropout,
        why=lambda run: f"dropout={run.dropout:g} does not go with target-parameters",
        instead="peft adds an adapter to the weights of experts, before they see an input",
    ),
    Rule(
        when=lambda run: run.target_parameters and run.start != "random",
        why=lambda run: f"start={run.start} is for linear layers",
        instead="leave target-parameters out, or use start=random",
    ),
    Rule(
        when=lambda run: run.target_parameters and run.patterned,
        why=lambda run: "rank-pattern and alpha-pattern are for linear layers",
        instead="peft would read them for experts as well: leave target-parameters out",
    ),
    Rule(
        when=lambda run: run.target_parameters and run.budget,
        why=lambda run: "budget chooses among linear layers",
        instead="leave target-parameters out, or budget",
    ),
    Rule(
        when=lambda run: run.new_tokens and run.start != "random",
        why=lambda run: f"start={run.start} makes an adapter without rows of new-tokens",
        instead="leave one of the two out",
    ),
    Rule(
        when=lambda run: run.new_tokens and not run.kind.factors,
        why=lambda run: "rows of new-tokens are trained beside LoRA adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: len(set(run.new_tokens)) < len(run.new_tokens),
        why=lambda run: f"new-tokens names a token twice, found {run.new_tokens}",
        instead="give each once",
    ),
    Rule(
        when=lambda run: run.layers and not run.kind.blocks,
        why=lambda run: "layers are those of LoRA adapters and sparse sets",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.budget and not run.kind.factors,
        why=lambda run: "budget chooses modules of LoRA adapters",
        instead=lambda run: f"parameters={run.parameters} has none",
    ),
    Rule(
        when=lambda run: run.budgeted and (run.new_tokens or run.target_parameters),
        why=lambda run: "budget chooses linear layers by what their backward pass takes",
        instead="that of new-tokens and target-parameters is another, set layers",
    ),
    Rule(
        when=lambda run: run.scores != "gain" and not (run.budgeted and run.public),
        why=lambda run: f"scores={run.scores} is for budget with public=FILE.jsonl",
        instead="give both, or leave it out",
    ),
    Rule(
        when=lambda run: run.budget and run.ranks,
        why=lambda run: "budget is for one rank of all clients",
        instead=lambda run: f"found ranks={list(run.ranks)}, leave one of the two out",
    ),
)

STARTS: tuple[Rule[Adapter], ...] = (
    Rule(
        when=lambda run: run.public and not run.reads_public,
        why=lambda run: (
            f"public={run.public} is for start={starts.with_rows()}, for budget, and for "
            f"select={' or '.join(READS_ROWS)} or regrow"
        ),
        instead="leave it out",
    ),
    Rule(
        when=lambda run: run.begins.rows and not run.public,
        why=lambda run: f"start={run.start} needs public=FILE.jsonl",
        instead="rows that belong to no client",
    ),
    Rule(
        when=lambda run: run.public and run.public == run.data,
        why=lambda run: "public rows belong to no client",
        instead="found the file of the clients' data",
    ),
    Rule(
        when=lambda run: run.start == "orthogonal" and run.rank % 2,
        why=lambda run: f"start=orthogonal halves the rank, found rank={run.rank}",
        instead="use an even one",
    ),
)
