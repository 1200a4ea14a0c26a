"""LoRA adapters as they are saved: read strictly, cut to a rank, written again."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from corolla.errors import ArtefactError, WireError
from corolla.host.files import making_folder
from corolla.models.files import adapter_files
from corolla.tensors import factors
from corolla.types import LoraSpec, Params
from corolla.wire import codec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PLAIN = {
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""Keys of peft that change what factors mean → the values without an effect; None is one too."""


_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of peft after which the factors of an adapter belong to a base that they have changed."""


@dataclass(frozen=True)
class SavedLora:
    """A saved adapter: its update is scaling · B · A of each module, by the base model's names."""

    update: Params
    spec: LoraSpec
    heads: Params
    """Tensors that take the place of the base model's."""
    config: Mapping[str, Any]
    """The content of adapter_config.json."""

    @property
    def baked(self) -> Params:
        """The factors at scaling 1."""
        return factors.bake(self.update, self.spec.scaling)


def read_lora(folder: Path) -> SavedLora:
    """Read a LoRA adapter. Raises ArtefactError for what is none, or is more than factors."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        tensors, _ = codec.read(str(folder / TENSORS))
        why = other(config)
        if not why:
            spec = LoraSpec(
                int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora", False))
            )
    except (OSError, ValueError, KeyError, TypeError, WireError) as error:
        raise ArtefactError(f"{folder} is no adapter: {error}") from error
    if why:
        raise ArtefactError(f"{folder} {why}: only plain LoRA is known")
    named = {n.removeprefix(adapter_files.PREFIX): t for n, t in tensors.items()}
    plain = {n.removesuffix(".weight"): n for n in named}
    update = {
        short: named[name]
        for short, name in plain.items()
        if factors.is_a(short) or factors.is_b(short)
    }
    heads = {name: named[name] for short, name in plain.items() if short not in update}
    if odd := _odd(update, heads, spec):
        raise ArtefactError(f"{folder} is no adapter of LoRA: {odd}")
    return SavedLora(update, spec, heads, config)


def _odd(update: Params, heads: Params, spec: LoraSpec) -> str:
    """The fault of the tensors of an adapter; "" for factors of its rank, in pairs."""
    if spec.rank < 1 or not math.isfinite(spec.alpha):
        return f"its configuration has r={spec.rank} and lora_alpha={spec.alpha:g}"
    for name, tensor in update.items():
        other_one = name[: -len(factors.A)] + (factors.B if factors.is_a(name) else factors.A)
        if other_one not in update:
            return f"it has {name} and no {other_one}"
        rank = tensor.shape[-1 if factors.is_b(name) else 0] if tensor.dim() == 2 else None
        if rank != spec.rank:
            return f"{name} is of shape {tuple(tensor.shape)}, its configuration has r={spec.rank}"
    more = [name for name in heads if ".lora_" in name]
    return f"{more[0]} is no factor of a linear layer" if more else ""


def read_addition(folder: Path) -> SavedLora:
    """Read a LoRA adapter that is added to its base as it is.

    Raises ArtefactError as `read_lora` does, for values that are not finite, and where the start of
    the adapter has changed its base: what its factors then say is no difference to the base that
    others have.
    """
    saved = read_lora(folder)
    for name, tensor in {**saved.update, **saved.heads}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{folder} has values in {name} that are not finite")
    begun = str(saved.config.get("init_lora_weights", True))
    if begun.startswith(_OF_ANOTHER_BASE):
        raise ArtefactError(
            f"{folder} belongs to a base that {begun} has changed: save it with peft's "
            f"path_initial_model_for_weight_conversion first"
        )
    return saved


def other(config: Mapping[str, Any]) -> str:
    """Returns how the content of adapter_config.json is more, or else, than LoRA of linear layers.

    The end of a sentence; "" for plain LoRA.
    """
    if (kind := config["peft_type"]) != "LORA":
        return f"is of type {kind}"
    if odd := [key for key, usual in _PLAIN.items() if config.get(key) not in (None, usual)]:
        return f"has {odd[0]}={config[odd[0]]}"
    return ""


def cut(saved: SavedLora, rank: int) -> tuple[SavedLora, float]:
    """The best adapter of rank at most `rank` and its relative error on effective weights.

    The truncated SVD of each module's update (Eckart and Young), from the factors in fp64; the
    error is ‖exact - cut‖_F / ‖exact‖_F over all modules. One that is no larger stays as it is.
    """
    if saved.spec.rank <= rank:
        return saved, 0.0
    best, error = factors.compact(saved.baked, rank)
    to = factors.rank(best)
    return replace(saved, update=factors.pad(best, to), spec=LoraSpec(to, float(to))), error


def write_lora(folder: Path, saved: SavedLora, like: Path, base: str) -> None:
    """Write an adapter folder with the tokenizer of the folder `like`; `base` is a name or a path.

    Rank stabilisation is baked into alpha: alpha / r is the same number.
    """
    spec = saved.spec
    config = {
        **saved.config,
        "r": spec.rank,
        "lora_alpha": spec.scaling * spec.rank,
        "use_rslora": False,
        "base_model_name_or_path": adapter_files.portable(base, folder),
    }
    tensors = {
        adapter_files.PREFIX + name + ("" if name in saved.heads else ".weight"): tensor
        for name, tensor in {**saved.update, **saved.heads}.items()
    }
    with making_folder(folder) as scratch:
        copy_tokenizer(like, scratch)
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        codec.write(str(scratch / TENSORS), tensors, {"format": "pt"})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and its chat template, from one folder to another."""
    for pattern in ("tokenizer*", "*.jinja", "vocab*", "merges*", "special_tokens*", "added_tok*"):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
