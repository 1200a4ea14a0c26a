"""The memory and the arithmetic of training a model, by formula: nothing is loaded.

Peak resident memory is what lies there all the time plus what the worst moment adds. Every term has
a name; `experiments/bench/memory.py` measures LIBRARIES, TOKENIZER, WORK and HEAP and holds the sum
against real processes. Activations are counted layer by layer: what autograd keeps of a transformer
block for the backward pass (Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv 2205.05198, section 4, without dropout and with an attention that does
not keep its matrix), and what LoRA adds to it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from corolla.config.run import RunConfig
from corolla.interfaces import Choosing
from corolla.models import kinds
from corolla.models.anatomy import Anatomy, Shape
from corolla.models.experts import fused
from corolla.models.tokens import tables
from corolla.strategies.listing import registry
from corolla.tensors import units
from corolla.types import TrainerName

LIBRARIES = 421_000_000
"""Python with torch (CPU build), transformers and peft imported; a CUDA build takes more."""
TOKENIZER = 9.1
"""Bytes that a tokenizer takes for each byte of its tokenizer.json."""
WORK = 20_000_000
"""The autograd engine, buffers of matrix products, code that is first run in training."""
HEAP = 1.9
"""Bytes that the heap takes for each byte of activations: glibc cannot use all that was freed."""
MAPPED = 32 << 20
"""Blocks of at least this are mapped from the system and go back to it (M_MMAP_THRESHOLD_MAX)."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes a weight of linear layers; NF4 has a number of fp32 for each 64."""
_TRANSIENT = 5
"""The widest tensors of a block that a forward pass without gradients has at a time."""
_PROBE = 4
"""Sequences whose logits are compared at the end of a run, with four copies of them."""

Blocks = Sequence[tuple[float, float]]
"""(how many, bytes of each)."""


@dataclass(frozen=True)
class Batch:
    """The sequences that go through the model at a time, padded to `tokens`; `targets` in all."""

    sequences: int
    tokens: int
    targets: int
    padded: bool = True
    """Some are shorter: attention needs a mask, and keys and values as wide as queries."""

    @property
    def positions(self) -> int:
        """Tokens with the padding."""
        return self.sequences * self.tokens

    def of(self, config: RunConfig) -> "Batch":
        """As it goes through the model: private rows have one form (client/training/padding.py)."""
        if config.dp != "example":
            return self
        length = config.max_length
        return Batch(self.sequences, length, self.sequences * (length - 1), padded=False)

    def limited(self, sequences: int) -> "Batch":
        """A part of it, of at most so many sequences; targets in proportion."""
        if sequences >= self.sequences:
            return self
        targets = math.ceil(self.targets * sequences / self.sequences)
        return replace(self, sequences=sequences, targets=targets)


@dataclass(frozen=True)
class Estimate:
    """The peak of resident memory: name of a term → bytes."""

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Workload:
    """The work of a client, however its settings spread it over memory and time."""

    model: Anatomy
    batch: Batch
    """The largest batch of training."""
    evaluated: Batch | None = None
    """The largest batch of evaluation; None: it does not evaluate."""
    labels: int = 0
    """Classes of a classifier; 0: the model generates."""


def client(
    work: Workload,
    config: RunConfig,
    trainer: TrainerName,
    messages: int | None = None,
    kept: int | None = None,
) -> Estimate:
    """A process that trains one client after another with `config`.

    `messages`: bytes of a task and its reply (default: the trained values twice). With `kept` it is
    a whole simulation, which has so many bytes of state and updates, and verifies the saved model
    at the end.
    """
    anatomy, evaluated, labels = work.model, work.evaluated, work.labels
    shapes = trained_shapes(anatomy, config, labels)
    values = _count(shapes)
    stepped = _count({name: shapes[name] for name in _stepped(anatomy, config, shapes)})
    in_place = config.kind.whole and trainer == "zeroth_order"
    batch = work.batch.of(config).limited(config.micro_batch_size or config.batch_size)
    batch = replace(batch, tokens=batch.tokens + config.prefix)
    sparing = config.gradient_checkpointing and trainer == "first_order"
    if trainer == "first_order":
        activations = _kept(anatomy, config, batch)
        logits = _logits(anatomy, config, batch, 3, labels)
    else:
        activations = _passing(anatomy, config, batch)
        logits = _logits(anatomy, config, batch, 2, labels)
    steps = {"adamw": 3, "sgd": 1}[config.optimizer] if trainer == "first_order" else 1
    terms = {
        "libraries": LIBRARIES,
        "tokenizer": TOKENIZER * anatomy.tokenizer_bytes,
        "weights": weights(anatomy, config),
        "weights in fp32": _masters(anatomy, config, trainer),
        "trained values, at the start and now": 0 if in_place else 8 * values,
        "gradients and optimiser": 0 if in_place else 4 * steps * stepped,
        "sparse set": _sparse_set(anatomy, config, trainer),
        "gradients of each example": _apart(config, trainer, batch, values),
        "messages": messages if messages is not None else (0 if in_place else 8 * values),
        "experts with their adapters": _adapted_experts(anatomy, config, trainer),
        "tables with trained rows": _tables(anatomy, config, trainer),
        "weights with their update": _turned(anatomy, config),
        "activations": _resident(activations, sparing),
        "logits": _resident(logits, sparing),
        "work": WORK,
    }
    if kept is not None:
        terms["state and updates"] = kept
    if evaluated:
        if kept is None:  # a client scores as it trains; a server does not know its limits
            evaluated = evaluated.limited(config.micro_batch_size or evaluated.sequences)
        moments = _evaluating(anatomy, config, evaluated, labels, verified=kept is not None)
        terms["evaluation, beyond training"] = max(
            _beyond([*activations, *logits], moment, sparing) for moment in moments
        )
    return Estimate({name: round(size) for name, size in terms.items() if size})


def server(
    anatomy: Anatomy, config: RunConfig, evaluated: Batch, kept: int = 0, labels: int = 0
) -> Estimate:
    """A process that evaluates and verifies the global model, and keeps `kept` bytes of state."""
    scored, verified = _evaluating(anatomy, config, evaluated, labels, verified=True)
    terms = {
        "libraries": LIBRARIES,
        "tokenizer": TOKENIZER * anatomy.tokenizer_bytes,
        "weights": weights(anatomy, config),
        "state and updates": kept,
        "evaluation": _resident(scored, sparing=False),
        "weights with their update": _turned(anatomy, config),
        "verification, beyond evaluation": _beyond(scored, verified, sparing=False),
        "work": WORK,
    }
    return Estimate({name: round(size) for name, size in terms.items() if size})


def trained(anatomy: Anatomy, config: RunConfig, labels: int = 0) -> int:
    """How many values are trained."""
    return _count(trained_shapes(anatomy, config, labels))


def trained_shapes(anatomy: Anatomy, config: RunConfig, labels: int = 0) -> dict[str, Shape]:
    """Shapes of the tensors that are trained, by name."""
    usual: dict[str, Shape] = {"score.weight": (labels, anatomy.hidden)} if labels else {}
    return {**kinds.of(config).shapes(anatomy, config, labels), **(anatomy.head or usual)}


def weights(anatomy: Anatomy, config: RunConfig) -> float:
    """Bytes of the base model; its linear layers may be quantised."""
    width = _WIDTH[config.dtype]
    if config.quantization == "none":
        return float(width * anatomy.values)
    linear = sum(math.prod(shape) for shape in anatomy.linear().values())
    return width * (anatomy.values - linear) + _QUANTISED[config.quantization] * linear


def operations(anatomy: Anatomy, config: RunConfig, trainer: TrainerName, batch: Batch) -> float:
    """Floating-point operations of a step: products with weights, as all else is little.

    A pass forward is 2 for each weight and position (Kaplan et al., arXiv 2001.08361); gradients of
    the inputs take the same again in the blocks that a backward pass goes through, those of the
    weights only where these are trained.
    """
    blocks, head = _forward(anatomy, config, batch)
    if trainer == "zeroth_order":
        return 2 * config.queries * (blocks + head)
    passed = _passed(anatomy, config) / anatomy.layers
    stepped = len(_adapted(anatomy, config)) / anatomy.layers
    inputs = (passed * blocks + head) * (1 + config.gradient_checkpointing)
    return (
        (blocks + head)
        + inputs
        + (stepped * blocks + head) * (config.kind.whole or config.kind.sparse)
    )


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _choosing(config: RunConfig) -> Choosing | None:
    """The strategy, where its clients train a part of the tensors in each round."""
    strategy = registry.create(config.strategy, config.options)
    return strategy if isinstance(strategy, Choosing) else None


def _stepped(anatomy: Anatomy, config: RunConfig, names: Collection[str]) -> Collection[str]:
    """The trained tensors that have gradients in the round that takes most memory."""
    choosing = _choosing(config)
    return choosing.most(names, anatomy.layers)[1] if choosing else names


def _masters(anatomy: Anatomy, config: RunConfig, trainer: TrainerName) -> int:
    """Bytes of the weights that steps are taken on, beside the roundings that are computed with."""
    half = config.kind.whole and config.dtype != "float32" and trainer == "first_order"
    return 4 * anatomy.values if half else 0


def scoring(anatomy: Anatomy, config: RunConfig, batch: Batch) -> float:
    """Floating-point operations of a pass forward over a batch, as `keep_hardest` scores it."""
    return sum(_forward(anatomy, config, batch))


def _forward(anatomy: Anatomy, config: RunConfig, batch: Batch) -> tuple[float, float]:
    """The operations of a pass forward: (blocks, output layer)."""
    batch = batch.of(config)
    linear = sum(math.prod(shape) for shape in anatomy.linear().values())
    linear += fused.used(anatomy.stacks(), anatomy.experts_per_token)
    head = 2.0 * anatomy.vocabulary * anatomy.hidden * batch.targets
    return 2.0 * linear * batch.positions, head


# --- the worst moment -----------------------------------------------------------------------------


def _sparse_set(anatomy: Anatomy, config: RunConfig, trainer: TrainerName) -> float:
    """Places and the base's values at them; backpropagation has one matrix's whole gradient."""
    if not config.kind.sparse:
        return 0.0
    modules = anatomy.linear(config.target_modules, config.layers)
    values = config.rank * sum(map(sum, modules.values()))
    gradient = max(map(math.prod, modules.values())) if trainer == "first_order" else 0
    return 12.0 * values + 4.0 * gradient


def _apart(config: RunConfig, trainer: TrainerName, batch: Batch, values: int) -> float:
    """Tells a batch's examples apart under example-level privacy (client/training/dpsgd.py)."""
    if config.dp != "example" or trainer != "first_order":
        return 0.0
    exact = config.dtype == "float32" and config.quantization == "none"
    alike = config.kind.hooked and not (config.target_parameters or config.dora)
    hooked = exact and alike  # else one sequence at a time
    return 4.0 * values * (batch.sequences if hooked else 1) + 8.0 * values  # the sum is in fp64


def _adapted_experts(anatomy: Anatomy, config: RunConfig, trainer: TrainerName) -> float:
    """Weights of experts with an adapter added, of all layers or of one, and a gradient of them."""
    every, largest = fused.adapted(anatomy.stacks(config.layers), config, anatomy.name)
    kept = trainer == "first_order" and not config.gradient_checkpointing
    return _WIDTH[config.dtype] * ((every if kept else largest) + largest)


def _tables(anatomy: Anatomy, config: RunConfig, trainer: TrainerName) -> float:
    """Copies of input and output tables with the rows of new tokens, and gradients of both."""
    if not config.new_tokens:
        return 0.0
    largest = max(
        math.prod(shape) for shape in tables.of_both(anatomy.tensors, anatomy.name).values()
    )
    return _WIDTH[config.dtype] * largest * (4 if trainer == "first_order" else 2)


def _turned(anatomy: Anatomy, config: RunConfig) -> float:
    """Bytes that peft makes of a module's weight to know the lengths of its rows, for a moment.

    B A, s B A and W + s B A (out, in) in fp32, and the identity (in, in) that A is multiplied with.
    """
    if not config.dora:
        return 0.0
    modules = anatomy.linear(config.target_modules, config.layers)
    return max(4.0 * (3 * out * into + into * into) for out, into in modules.values())


def _kept(anatomy: Anatomy, config: RunConfig, batch: Batch) -> Blocks:
    """Returns the blocks that autograd keeps of all layers until the backward pass.

    From the code of transformers and peft: the inputs of norms, adapters and activation functions,
    and of attention its inputs and its output.
    """
    layer, passed = _layer(anatomy, config, batch), _passed(anatomy, config)
    if config.gradient_checkpointing:
        inputs = _WIDTH[config.dtype] * batch.positions * anatomy.hidden
        return [(passed + 1, inputs), *layer]
    adapted = len(_adapted(anatomy, config))
    between = _layer(anatomy, config, batch, frozen=True)
    return [
        *((adapted * count, size) for count, size in layer),
        *(((passed - adapted) * count, size) for count, size in between),
    ]


def _adapted(anatomy: Anatomy, config: RunConfig) -> Sequence[int]:
    """Numbers of the blocks that are trained."""
    there: Sequence[int] = range(anatomy.layers)
    if config.layers is not None or (config.kind.factors and config.target_modules):
        modules = anatomy.linear(config.target_modules, config.layers)
        found = {place[1] for name in modules if (place := units.block(name))}
        there = sorted(found) or there
    choosing = _choosing(config)
    return [there[i] for i in choosing.most((), len(there))[0]] if choosing else there


def _passed(anatomy: Anatomy, config: RunConfig) -> int:
    """How many blocks a backward pass goes through: those from the deepest trained one upwards."""
    deepest = min(_adapted(anatomy, config))
    embedded = config.kind.whole and any(
        "embed" in units.of([n]) for n in _stepped(anatomy, config, anatomy.tensors)
    )
    return anatomy.layers - (0 if config.new_tokens or embedded else deepest)


def _layer(anatomy: Anatomy, config: RunConfig, batch: Batch, frozen: bool = False) -> Blocks:
    """Returns what one block keeps; a frozen one, without adapters, not the inputs of these."""
    width, positions = _WIDTH[config.dtype], batch.positions
    queries = anatomy.heads * anatomy.head_dim
    keys = anatomy.kv_heads * anatomy.head_dim
    shown = queries if batch.padded else keys
    fed = (4 if _gated(anatomy) else 2) - frozen
    normed = 0 if frozen else 2 + anatomy.norms * config.kind.whole  # by which weights are scaled
    blocks: list[tuple[float, float]] = [
        (anatomy.norms + normed, width * positions * anatomy.hidden),
        (2, width * positions * queries),
        (2, width * positions * shown),
        (fed, width * positions * anatomy.intermediate),
    ]
    if anatomy.head_norms:
        blocks += [(1, width * positions * queries), (1, width * positions * keys)]
    if config.kind.factors and not frozen:
        modules = anatomy.linear(config.target_modules, config.layers)
        adapted = len(_adapted(anatomy, config))
        each = len(modules) / adapted
        blocks.append((each, 4 * positions * config.lora.rank))
        if config.dora:  # magnitudes scale what the base gives and what the adapter gives
            outputs = positions * sum(out for out, _ in modules.values()) / len(modules)
            blocks += [(each, width * outputs), (each, 4 * outputs)]
        if width < 4:  # adapters compute in fp32 on a copy of their input; norms do as well
            inputs = sum(into for _, into in modules.values()) / adapted
            blocks.append((1, 4 * positions * inputs))
            blocks.append((anatomy.norms, 4 * positions * anatomy.hidden))
    return blocks


def _gated(anatomy: Anatomy) -> bool:
    wide = [n for n, s in anatomy.linear().items() if ".0." in n and anatomy.intermediate in s]
    return len(wide) > 2


def _passing(anatomy: Anatomy, config: RunConfig, batch: Batch) -> Blocks:
    """The tensors of one layer in a forward pass that keeps nothing."""
    widest = max(anatomy.intermediate, anatomy.heads * anatomy.head_dim, anatomy.hidden)
    return [(_TRANSIENT, _WIDTH[config.dtype] * batch.positions * widest)]


def _logits(
    anatomy: Anatomy, config: RunConfig, batch: Batch, copies: int, labels: int = 0
) -> Blocks:
    """Logits of the targets in fp32 and their log-softmax; in a backward pass its gradient too."""
    classes, rows = (labels, batch.sequences) if labels else (anatomy.vocabulary, batch.targets)
    half = _WIDTH[config.dtype] * rows * classes if config.dtype != "float32" else 0
    return [(copies, 4.0 * rows * classes), (1, half)]


def _evaluating(
    anatomy: Anatomy, config: RunConfig, batch: Batch, labels: int, verified: bool
) -> list[Blocks]:
    """Returns the blocks of scoring and, where `verified`, the blocks of verifying.

    Verifying takes all logits of a few sequences, of two models, copied.
    """
    scored = [*_passing(anatomy, config, batch), *_logits(anatomy, config, batch, 2, labels)]
    rows = min(_PROBE, batch.sequences) * (1 if labels else batch.tokens)
    size = 4.0 * rows * (labels or anatomy.vocabulary)
    return [scored, [(4, size)]] if verified else [scored]


def _resident(blocks: Blocks, sparing: bool) -> float:
    factor = 1.0 if sparing else HEAP
    return sum(n * size * (1 if size >= MAPPED else factor) for n, size in blocks)


def _beyond(first: Blocks, then: Blocks, sparing: bool) -> float:
    """Returns the bytes that `then` adds to the peak of `first`.

    The heap stays, mapped blocks have gone.
    """
    factor = 1.0 if sparing else HEAP
    heaps = [factor * sum(n * s for n, s in blocks if s < MAPPED) for blocks in (first, then)]
    mapped = [sum(n * s for n, s in blocks if s >= MAPPED) for blocks in (first, then)]
    return max(0.0, max(heaps) + max(mapped) - heaps[0] - mapped[0])
