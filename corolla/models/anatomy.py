"""The anatomy of a model, from config.json and file headers: its weights are never read."""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from corolla.embedded.assets import asset
from corolla.errors import ModelError
from corolla.models import layers
from corolla.models.experts import fused
from corolla.models.patterns import Patterns
from corolla.models.sizes import decoders
from corolla.tensors import factors
from corolla.types import LoraSpec

Shape = tuple[int, ...]

_OUTSIDE = re.compile(
    r"embed(?!ding_hidden_mapping)|emb\b|wte|wpe|lm_head|shared|score|classifier|rel_attn|norm|ln_"
)
"""Names of 2-D weights that are no linear layers of a block."""

_IN_OUT = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Families whose linear layers are Conv1D: (in, out)."""

_SAME = {  # as families call it: what is meant
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff"),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx"),
}

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "experts_per_token")

_GGUF_NAMES = {
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}

_LONGEST_HEADER = 1 << 28
_GGUF_TOKENIZER = 5
"""The tokenizer.json of a GGUF file is so many times as long as its header (Gemma 3: 33 MB)."""


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a decoder or encoder. `tensors`: name → shape as (out, in), as transformers has."""

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None
    tensors: Mapping[str, Shape]
    """Returns the fused tensors of experts that transformers fuses as it loads them."""
    tokenizer_bytes: int
    tokenizer: Path | None = None
    """tokenizer.json, where there is one."""
    head: Mapping[str, Shape] = field(default_factory=dict)
    """Tensors of a classifier that are trained as they are: name → shape; {} where not known."""
    experts_per_token: int = 0
    """Experts of a layer that a token goes through; 0 without experts."""

    @property
    def values(self) -> int:
        """Parameters of the model; a tied output layer counts once."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def norms(self) -> int:
        """Norm layers in a block, those of queries and keys not counted."""
        found = [n for n in self._block() if "norm" in n or "ln_" in n or "LayerNorm" in n]
        return len([n for n in found if n.endswith("weight") and "q_" not in n and "k_" not in n])

    @property
    def head_norms(self) -> bool:
        """Queries and keys have norms of their own."""
        return any("q_norm" in name or "attn_q_norm" in name for name in self._block())

    def linear(
        self, targets: Sequence[str] | None = None, blocks: str | None = None
    ) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers by name; of those meant by `targets`, in these blocks.

        `blocks` are as the key `layers` has them. Raises ModelError for a target that matches none,
        and for a block that there is not.
        """
        found = self._linear
        for target in targets or ():
            if not any(_meant(name, target) for name in found):
                raise ModelError(f"target modules {target} match nothing in {self.name}")
        found = {name: found[name] for name in layers.kept(found, blocks)}
        if not targets:
            return found
        return {n: s for n, s in found.items() if any(_meant(n, target) for target in targets)}

    def adapter(
        self,
        spec: LoraSpec,
        targets: Sequence[str] | None = None,
        blocks: str | None = None,
        patterns: Patterns | None = None,
    ) -> dict[str, Shape]:
        """Shapes of the factors of a LoRA adapter. Raises ModelError as `linear`."""
        shapes: dict[str, Shape] = {}
        linear, own = self.linear(targets, blocks), patterns or Patterns()
        own.check(linear, self.name)
        for name, (out, into) in linear.items():
            rank = own.spec(name, spec).rank
            if rank > min(out, into):
                raise ModelError(f"rank {rank} is larger than module {name} ({out} x {into})")
            shapes[name + factors.A], shapes[name + factors.B] = (rank, into), (out, rank)
        return shapes

    def stacks(self, blocks: str | None = None) -> dict[str, Shape]:
        """(experts, out, in) of the tensors that have the weights of several experts, by name.

        `blocks` as in `linear`. Raises ModelError for a block that there is not.
        """
        found = {n: s for n, s in self.tensors.items() if len(s) == 3 and "conv" not in n}
        turned = self.family in fused.TURNED
        found = {n: (s[0], s[2], s[1]) if turned else s for n, s in found.items() if s[0] > 1}
        return {name: found[name] for name in layers.kept(found, blocks if found else None)}

    @cached_property
    def _linear(self) -> dict[str, tuple[int, int]]:
        """The shapes of all modules and blocks: estimates ask for them thousands of times."""
        found = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.tensors.items()
            if len(shape) == 2 and name.endswith(".weight") and not _OUTSIDE.search(name)
        }
        if self.stacks():
            found = {n: s for n, s in found.items() if not fused.ROUTER.search(f"{n}.weight")}
        return found

    def _block(self) -> list[str]:
        return [name for name in self.tensors if ".0." in name]


def _meant(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def read(name: str) -> Anatomy:
    """The anatomy of a model by name, as `corolla simulate` takes it.

    Raises ModelError where there is no such model, or its files do not say enough.
    """
    try:
        path = locate(name)
        return _of_gguf(path, name) if path.suffix == ".gguf" else _of_folder(path, name)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"cannot tell what {name} is made of: {reason}") from error


def locate(name: str) -> Path:
    """The folder or .gguf file of a model; nothing is downloaded or converted.

    Raises ModelError when it is not on this machine.
    """
    if name == "embedded":
        return asset("model")
    from corolla.models.files import folders  # takes a second

    path = folders.packaged(name) if name in folders.PACKAGED else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        folder = folders.converted(path)
        return folder if folder.is_dir() else path
    if path.suffix != ".gguf" and not path.exists() and not name.startswith((".", "/", "~")):
        path = folders.folder_of(name)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model {name!r} is not on this machine: expected a folder with config.json, a .gguf "
            f"file, or a hub name that has been downloaded"
        )
    return path


# --- a folder of safetensors ----------------------------------------------------------------------


def _of_folder(folder: Path, name: str) -> Anatomy:
    told: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {**told, **told.get("text_config", {})}
    tensors: dict[str, Shape] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= _header(path)
    tensors = tensors or decoders.tensors(told)
    if not tensors:
        raise ModelError(
            f"model {name} has no .safetensors file, and config.json alone says the sizes of "
            f"{', '.join(decoders.FAMILIES)} models only"
        )
    family = str(told.get("model_type", ""))
    if family in _IN_OUT:
        tensors = {n: s[::-1] if not _OUTSIDE.search(n) else s for n, s in tensors.items()}
    tensors = fused.tensors(tensors)
    sizes = {key: _first(told, names) for key, names in _SAME.items()}
    hidden, heads = sizes["hidden"] or 0, sizes["heads"] or 1
    tokenizer = folder / "tokenizer.json"
    return Anatomy(
        name=name,
        family=family,
        layers=sizes["layers"] or 1,
        hidden=hidden,
        intermediate=sizes["intermediate"] or 4 * hidden,
        heads=heads,
        kv_heads=int(told.get("num_key_value_heads") or heads),
        head_dim=int(told.get("head_dim") or hidden // heads),
        vocabulary=int(told["vocab_size"]),
        positions=sizes["positions"],
        tensors=tensors,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else 0,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        experts_per_token=_first(told, _PER_TOKEN) or 0,
    )


def _first(told: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((int(told[name]) for name in names if told.get(name)), None)


def _header(path: Path) -> dict[str, Shape]:
    """Shapes of the tensors in a safetensors file, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size):
            raise ValueError(f"{path.name} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return {n: tuple(entry["shape"]) for n, entry in header.items() if n != "__metadata__"}


# --- a GGUF file ----------------------------------------------------------------------------------

_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key; of an array how many values it has.

    Raises ValueError or struct.error for a file that is none.
    """
    with path.open("rb") as file:
        return _metadata(file, path.name)[0]


def _metadata(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """The metadata and the number of tensors, which are described next.

    The package gguf reads all entries of a vocabulary, for half a minute; this skips them.
    """
    if file.read(4) != b"GGUF":
        raise ValueError(f"{name} is no GGUF file")
    (_, tensors, entries) = struct.unpack("<IQQ", file.read(20))
    told: dict[str, Any] = {}
    for _ in range(entries):
        key = _string(file)
        told[key] = _value(file, _number(file, "I"))
    return told, tensors


def _of_gguf(path: Path, name: str) -> Anatomy:
    with path.open("rb") as file:
        told, tensors = _metadata(file, path.name)
        shapes = dict(_gguf_tensor(file) for _ in range(tensors))
        length = file.tell()
    family = str(told["general.architecture"])
    own = {k.removeprefix(family + "."): v for k, v in told.items() if k.startswith(family + ".")}
    heads, hidden = int(own["attention.head_count"]), int(own["embedding_length"])
    return Anatomy(
        name=name,
        family=family,
        layers=int(own["block_count"]),
        hidden=hidden,
        intermediate=int(own["feed_forward_length"]),
        heads=heads,
        kv_heads=int(own.get("attention.head_count_kv", heads)),
        head_dim=int(own.get("attention.key_length", hidden // heads)),
        vocabulary=int(told["tokenizer.ggml.tokens"]),
        positions=int(own["context_length"]) if "context_length" in own else None,
        tensors=shapes,
        tokenizer_bytes=_GGUF_TOKENIZER * length,
    )


def _gguf_tensor(file: BinaryIO) -> tuple[str, Shape]:
    """(name as transformers has it, shape); dimensions are written from the last to the first."""
    name = _string(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))[::-1]
    file.seek(12, 1)  # type and place
    name = name.replace("blk.", "model.layers.", 1).replace("token_embd", "embed_tokens")
    if name == "output.weight":
        return "lm_head.weight", shape
    for short, long in _GGUF_NAMES.items():
        name = name.replace(f".{short}.weight", f".{long}.weight")
    return name, shape


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _LONGEST_HEADER:
        raise ValueError("a text in the header is too long")
    return bytes(file.read(length)).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """One value of the header; of an array how many it has."""
    if kind in _FIXED:
        return _number(file, _FIXED[kind])
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise ValueError(f"the header has a value of the unknown kind {kind}")
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _FIXED:
        file.seek(count * struct.calcsize("<" + _FIXED[inner]), 1)
    elif inner == _STRING:
        for _ in range(count):
            file.seek(_number(file, "Q"), 1)
    else:
        raise ValueError(f"the header has an array of the unknown kind {inner}")
    return count
