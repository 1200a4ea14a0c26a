"""Go on from an adapter that was trained before, in the form of peft."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ModelError, WireError
from corolla.models.files.adapter_files import PREFIX
from corolla.starts.material import Material
from corolla.tensors import factors
from corolla.types import LoraSpec, Params
from corolla.wire import codec

_ANOTHER = {
    "use_dora": "magnitudes of DoRA",
    "use_qalora": "grouped inputs of QA-LoRA",
    "use_bdlora": "block-diagonal factors",
    "alora_invocation_tokens": "tokens that switch it on",
    "layer_replication": "layers that are there twice",
    "target_parameters": "parameters that are no linear layers",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "biases of its own",
}
"""Settings of peft that make another model of the same factors → what they mean."""

_RESIDUAL = ("pissa", "olora", "corda", "lora_ga")
"""Starts of peft after which factors belong to a changed base."""


def adapter(material: Material) -> Params:
    """The adapter of the folder `start` at the run's rank and scaling: the same products.

    Modules of the run that it lacks start afresh; a smaller rank is filled up with rows of a fresh
    A beside zeros in B. Raises ArtefactError for a folder that has no adapter of LoRA, ModelError
    for one that does more than that, is of a larger rank, or of tensors that the run does not have.
    """
    check(material.config)
    folder = Path(material.config.start)
    told, tensors = _read(folder)
    _refuse(folder, told)
    start, spec = dict(material.fresh), material.spec
    modules = sorted(n.removesuffix(factors.A) for n in tensors if factors.is_a(n))
    for module in modules:
        a, b = (tensors.pop(module + role, None) for role in (factors.A, factors.B))
        shape = material.model.shapes.get(module)
        if a is None or b is None or shape != (len(b), a.shape[1]) or a.shape[0] != b.shape[1]:
            found = f"{len(b)} x {a.shape[1]}" if a is not None and b is not None else "one factor"
            wanted = f"{shape[0]} x {shape[1]}" if shape else "none: set target-modules or layers"
            raise ModelError(f"{folder} has an adapter on {module}, {found}; the run has {wanted}")
        if len(a) > spec.rank:
            raise ModelError(
                f"{folder} has rank {len(a)} on {module}, the run {spec.rank}: set "
                f"rank={len(a)}, or export the adapter at a smaller rank first"
            )
        a, b = _scaled(a, b, _spec(told, module, len(a)).scaling / spec.scaling)
        start[module + factors.A] = torch.cat([a, start[module + factors.A][len(a) :]])
        start[module + factors.B] = torch.cat([b, b.new_zeros(len(b), spec.rank - len(a))], dim=1)
    for name, tensor in tensors.items():
        if name not in start or start[name].shape != tensor.shape:
            kept = ", ".join(told.get("modules_to_save") or ()) or "none"
            here = str(tuple(start[name].shape)) if name in start else "not trained"
            raise ModelError(
                f"start={folder} brings {name}, {tuple(tensor.shape)}, trained as it is "
                f"(modules_to_save: {kept}); in this run it is {here}: no run goes on from it"
            )
        start[name] = tensor.float()
    if not modules:
        raise ArtefactError(f"{folder} is no adapter: it has no factors")
    return start


def check(config: RunConfig) -> None:
    """Raises ArtefactError where `start` names a folder that has no adapter. It opens no file."""
    folder = Path(config.start)
    if config.begins.name != "FOLDER" or (folder / "adapter_config.json").is_file():
        return
    found = "it has no adapter_config.json" if folder.is_dir() else "there is no such folder"
    if (folder / "adapter" / "adapter_config.json").is_file():
        found += f", use start={folder / 'adapter'}"
    elif (folder / "run.json").is_file():
        found += ", and is of a run without an adapter"
    raise ArtefactError(f"start={folder} is no adapter: {found}")


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The settings of an adapter, and its tensors by the names that they have here."""
    try:
        told = json.loads((folder / "adapter_config.json").read_text())
        tensors, _ = codec.read(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, WireError) as error:
        raise ArtefactError(f"start={folder} is no adapter: {error}") from error
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    short = {name: name.removesuffix(".weight") for name in named}
    return told, {
        name if factors.is_head(short[name]) else short[name]: tensor
        for name, tensor in named.items()
    }


def _refuse(folder: Path, told: Mapping[str, Any]) -> None:
    if told.get("peft_type") != "LORA":
        raise ModelError(f"start={folder} is an adapter of {told.get('peft_type')}, not of LoRA")
    for setting, meaning in _ANOTHER.items():
        if told.get(setting):
            raise ModelError(f"start={folder} has {meaning} ({setting}): no run goes on from it")
    if told.get("bias", "none") != "none":
        raise ModelError(f"start={folder} trains biases (bias={told['bias']}): train an adapter")
    begun = str(told.get("init_lora_weights", True))
    if begun.startswith(_RESIDUAL):
        raise ModelError(
            f"start={folder} belongs to a base that {begun} has changed: save it with peft's "
            f"path_initial_model_for_weight_conversion"
        )


def _spec(told: Mapping[str, Any], module: str, rank: int) -> LoraSpec:
    """The rank and scaling of one module of an adapter: peft has patterns beside one alpha."""
    patterns = told.get("alpha_pattern") or {}
    own = (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return LoraSpec(rank, next(own, told["lora_alpha"]), bool(told.get("use_rslora")))


def _scaled(a: Tensor, b: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Factors whose product counts `ratio` times, half of it in each; the same bits at 1."""
    root = abs(ratio) ** 0.5
    return a.float() * root, b.float() * (root if ratio >= 0 else -root)
