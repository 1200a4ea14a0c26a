"""`corolla export --to executorch`: a base model as a signed bundle for native clients."""

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from corolla.config.load import validate
from corolla.data.rows import read_rows
from corolla.errors import ArtefactError, ConfigError, ModelError
from corolla.host.processes import terminate_as_interrupt
from corolla.models import lora, pretrained
from corolla.models.files import adapter_files
from corolla.phones import bundle, lowering, selftest
from corolla.types import LoraSpec

BASES = ("fp32", "q4")
_FORMAT = {"fp32": "fp32", "q4": "8da4w"}
_PROCESS = 24 << 20
"""Of code, of libraries and of XNNPACK's own buffers. Peaks of a process without a network, minus
weights and arena: 11 to 17 MB (models of 1 and 16 million parameters, 16 to 128 tokens)."""


class Order(NamedTuple):
    """An order to export: `model` is a name or a folder; targets None: all linear layers.

    `layers`: the blocks with an adapter, as the key of runs; None: all.
    """

    model: str
    rank: int
    targets: tuple[str, ...] | None
    layers: str | None


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The request to `corolla export --to executorch`."""

    source: str
    """A base model by name or folder, or an adapter, whose rank and targets are taken."""
    out: Path | None
    """The bundle: a new folder."""
    key: Path | None
    """The file of the publisher's key, made where there is none."""
    model: str | None = None
    """Where the base of an adapter is now, if elsewhere."""
    rank: int | None = None
    targets: Sequence[str] | None = None
    layers: str | None = None
    length: int = 256
    """Tokens of a sequence."""
    bases: str = "fp32,q4"
    """Names of BASES, separated by commas."""
    serial: int | None = None
    """Serial number of the bundle; None: seconds since 1970."""


def make(request: ExportRequest, say: Callable[[str], None] = lambda text: None) -> bundle.Manifest:
    """Write the bundle of a base model, or of that of an adapter with its rank and targets.

    Takes minutes, and several times the memory of the model in fp32. Every program is run against
    torch before anything is written. Raises ConfigError for options, ModelError for a model that is
    no causal language model, or does not compile, or whose programs compute something else.
    """
    out, key, bases = request.out, request.key, request.bases
    if importlib.util.find_spec("executorch") is None:
        raise ConfigError("--to executorch needs ExecuTorch: pip install 'corolla[phones]'")
    if out is None or key is None:
        raise ConfigError("--to executorch needs --out, a new folder, and --key, a file")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty: name a new folder")
    if request.serial is not None and not 0 <= request.serial <= bundle.LAST_SERIAL:
        raise ConfigError(f"--serial {request.serial}: a whole number from 0 to 2^53-1")
    chosen = [base for base in BASES if base in bases.split(",")]
    if unknown := sorted(set(bases.split(",")) - set(BASES)):
        raise ConfigError(f"--base {unknown[0]!r} is unknown: use fp32, q4 or fp32,q4")
    order = wanted(request.source, request.rank, request.targets, request.layers)
    order = order._replace(model=request.model or order.model)
    say(f"loading {order.model}")
    adapter = _load(order, request.length)
    signer = bundle.signing_key(key)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside,
    ):
        scratch = Path(beside) / "bundle"  # not the one beside, which is its owner's alone
        scratch.mkdir()
        manifest = _fill(scratch, adapter, order, request.length, chosen, say)
        serial = int(time.time()) if request.serial is None else request.serial
        manifest = manifest.model_copy(update={"serial": serial})
        bundle.write(scratch, manifest, signer)
        if out.is_dir():
            out.rmdir()
        scratch.replace(out)
    return manifest


def summary(manifest: bundle.Manifest, out: str) -> str:
    """Returns a summary of the programs that were made, in one line."""
    made = []
    for program in manifest.programs:
        size = sum(manifest.files[name].bytes for name in program.files) / 1e6
        made.append(f"{program.name} ({', '.join(sorted(program.methods))}; {size:.1f} MB)")
    return f"{out}: {', '.join(made)}; every program agrees with torch; signed"


def wanted(
    source: str, rank: int | None, targets: Sequence[str] | None, layers: str | None
) -> Order:
    """Returns the order: as given, else as an adapter says, else rank 8 on all linear layers."""
    path = Path(source) / "adapter_config.json"
    if not path.is_file():
        return Order(source, rank or 8, tuple(targets) if targets else None, layers)
    try:
        config = json.loads(path.read_text())
        kind, own = config["peft_type"], config["target_modules"]
        model, own_rank = adapter_files.base_of(Path(source)), int(config["r"])
        blocks = config.get("layers_to_transform")
        has = ",".join(map(str, [blocks] if isinstance(blocks, int) else blocks or []))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read: {error!r}") from error
    if kind != "LORA" or config.get("task_type") != "CAUSAL_LM":
        raise ModelError(
            f"{source} is {kind} of {config.get('task_type')}: native clients train LoRA of causal "
            f"language models"
        )
    for key, what in (
        ("target_parameters", "experts"),
        ("trainable_token_indices", "tokens"),
        ("use_dora", "magnitudes"),
    ):
        if config.get(key):
            raise ModelError(f"{source} trains {what} ({key}), which native clients cannot")
    if config.get("rank_pattern"):
        raise ModelError(f"{source} has ranks by module: give --rank, and the base as the model")
    chosen = targets or ([own] if isinstance(own, str) else sorted(own))
    return Order(model, rank or own_rank, tuple(chosen), layers or has or None)


def _load(order: Order, length: int) -> lora.LoraModel:
    if length < 8:
        raise ConfigError(f"--length {length}: at least 8 tokens, as max-length of runs")
    # In fp32 whatever is stored: the fingerprint of runs, whose default that is, says the same.
    run = {"model": order.model, "task": "causal", "device": "cpu", "max_length": 8}
    config = validate({**run, "layers": order.layers})
    base = pretrained.load(config)
    text = base.model.config.get_text_config()
    if getattr(base.model.config, "is_encoder_decoder", False):
        raise ModelError(f"{order.model} is an encoder-decoder: native clients train causal ones")
    made, said = type(base.model).__name__, base.model.config.architectures
    if said and made not in said:
        raise ModelError(
            f"{order.model} is {', '.join(said)}, not {made}: native clients train causal language "
            f"models"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions and length > positions:
        raise ConfigError(
            f"--length {length} is more than the {positions} positions of {order.model}"
        )
    # Its backward pass is in operators that ExecuTorch has; that of fused attention is not.
    base.model.set_attn_implementation("eager")
    adapter = lora.LoraModel(base, order.targets, blocks=order.layers)
    spec = LoraSpec(order.rank, float(order.rank))
    adapter.check_rank(spec)
    adapter.write(adapter.init(spec, 0), spec)
    return adapter


def _fill(
    folder: Path,
    adapter: lora.LoraModel,
    order: Order,
    length: int,
    bases: Sequence[str],
    say: Callable[[str], None],
) -> bundle.Manifest:
    base = adapter.base
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    graph = lowering.Graph(adapter)
    cases = selftest.cases(graph, vocabulary, length)
    tensors = [
        bundle.Tensor(name=name, shape=(tensor.shape[0], tensor.shape[1]))
        for name, tensor in adapter.parameters()
    ]
    text = selftest.first_steps(graph, _text(base, vocabulary, length))
    made: dict[str, lowering.Lowered] = {}
    if "fp32" in bases:
        made["fp32"] = lowering.lower_fp32(graph, length, cases[-2].inputs, folder, say)
        selftest.check_fp32(folder, cases, say)
    if "q4" in bases:
        lowering.quantize(graph)
        made["q4"] = lowering.lower_q4(graph, length, cases[-2].inputs, folder, say)
        selftest.check_q4(folder, graph, cases, say)
    steps = {
        name: selftest.sound_steps(
            name, lowering.load(*(folder / file for file in lowered.files)), text, say
        )
        for name, lowered in made.items()
    }
    say("hashing and signing")
    programs = {path.name for path in folder.iterdir()}
    base.tokenizer.save_pretrained(folder)
    files = {path.name: bundle.describe(path) for path in sorted(folder.iterdir())}
    values = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors)
    return bundle.Manifest(
        model=order.model,
        model_sha256=base.fingerprint,
        executorch=lowering.version(),
        executorch_min="1.5.0",
        rank=order.rank,
        targets=tuple(adapter.targets),
        vocab=vocabulary,
        length=length,
        tokenizer=bundle.Tokenizer(
            files=tuple(sorted(files.keys() - programs)),
            eos=base.tokenizer.eos_token_id,
            pad=base.pad_id,
            bos=base.tokenizer.bos_token_id,
        ),
        adapter=tuple(tensors),
        programs=tuple(
            _program(name, lowered, steps[name], files, values) for name, lowered in made.items()
        ),
        files=files,
    )


def _text(base: pretrained.Base, vocabulary: int, length: int) -> torch.Tensor:
    """The first tokens of the embedded data, (1, length): text, in the model's own tokens."""
    rows, _ = read_rows("embedded")
    words = "\n".join(row.text for row in rows[: 8 + length // 16])
    ids = base.tokenizer(words, truncation=True, max_length=length)["input_ids"]
    return torch.tensor([ids]).clamp(max=vocabulary - 1)


def _program(
    name: str,
    lowered: lowering.Lowered,
    eps: tuple[float, float],
    files: dict[str, bundle.File],
    values: int,
) -> bundle.Program:
    weights = sum(files[file].bytes for file in lowered.files)
    return bundle.Program(
        name=name,
        base=_FORMAT[name],
        files=lowered.files,
        eps=eps,
        methods={
            method: bundle.Method(
                file=lowered.files[0],
                planned={
                    tokens: planned(method, weights, arena, values)
                    for tokens, arena in arenas.items()
                },
            )
            for method, arenas in lowered.arenas.items()
        },
    )


def planned(method: str, weights: int, arena: int, values: int) -> int:
    """Bytes that a native process has resident, at most, while it runs a method.

    `weights` are the bytes of its files, all of which are read, `arena` those of activations at its
    length. The adapter's `values` are there three times: as they are, scaled, and as they came;
    with gradients another three times: these and AdamW's two moments.
    """
    vectors = 6 if method == "grad" else 3
    return _PROCESS + weights + arena + 4 * values * vectors
