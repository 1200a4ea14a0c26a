"""Adapter folders in the form of peft: written whole, read back, merged and told apart."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corolla.errors import ArtefactError, WireError
from corolla.host.files import making_folder
from corolla.tensors import factors, tree
from corolla.types import LoraSpec, Params
from corolla.wire import codec

if TYPE_CHECKING:  # most of what reads these files loads no model
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""The prefix that peft puts before the names of the base model."""


def write_adapter(folder: Path, config: PeftConfig, tensors: Params) -> None:
    """An adapter folder, whole or not at all; `tensors` by the names that peft gives them."""
    with making_folder(folder) as scratch:
        config.save_pretrained(str(scratch))
        codec.write(str(scratch / "adapter_model.safetensors"), tensors, {"format": "pt"})


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A saved adapter on a base model, with plain peft. Raises ArtefactError when it is none."""
    if not (folder / "adapter_config.json").is_file():
        raise ArtefactError(f"{folder} is no adapter: it has no adapter_config.json")
    from peft import PeftModel, PeftType

    try:
        with torch.random.fork_rng(devices=[]), peft_speaks_to_transformers():
            model = quiet(PeftModel.from_pretrained(base, str(folder)).eval())
            # Of sparse tensors torch wants to be told whether it checks them, or it warns.
            if model.active_peft_config.peft_type == PeftType.SHIRA:
                torch.sparse.check_sparse_tensor_invariants.enable()  # type: ignore[no-untyped-call]
            return model
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtefactError(f"cannot load adapter {folder} on this base model: {reason}") from error


def quiet(model: PeftModel) -> PeftModel:
    """The model; with a prompt, `generate` does not warn any more.

    transformers 5 gives position ids, peft 0.21 says that it ignores them; they are then the right
    ones, counted over the prompt and the text.
    """
    if model.active_peft_config.is_prompt_learning:
        generate = model.generate

        def quietly(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Position ids are not supported")
                return generate(*args, **kwargs)

        model.generate = quietly
    return model


def read_adapter(folder: Path) -> tuple[Params, Params]:
    """(factors with their scaling in A, head tensors) of a saved adapter, by our names.

    Raises ArtefactError when it cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors, _ = codec.read(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, WireError) as error:
        raise ArtefactError(f"{folder} is no adapter: {error}") from error
    named = {n.removeprefix(PREFIX): t for n, t in tensors.items()}
    plain = {n.removesuffix(".weight"): t for n, t in named.items()}
    spec = LoraSpec(config["r"], config["lora_alpha"], config["use_rslora"])
    update = factors.select(plain, factors.is_a, factors.is_b)
    heads = {n: t for n, t in named.items() if factors.is_head(n.removesuffix(".weight"))}
    return factors.bake(update, spec.scaling), heads


def head_of(folder: Path) -> Params:
    """Tensors of a classifier's head in a saved adapter, by their names in the base model.

    Raises ArtefactError when it cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors, _ = codec.read(str(folder / "adapter_model.safetensors"))
        trained = tuple(f"{PREFIX}{name}." for name in config["modules_to_save"] or ())
    except (OSError, ValueError, KeyError, WireError) as error:
        raise ArtefactError(f"{folder} is no adapter: {error}") from error
    return {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(trained)}


def names(folder: Path) -> set[str]:
    """The names in the base model of what a saved adapter brings along; those of factors too.

    Raises ArtefactError when it cannot be read.
    """
    try:
        tensors, _ = codec.read(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, WireError) as error:
        raise ArtefactError(f"{folder} is no adapter: {error}") from error
    return {name.removeprefix(PREFIX) for name in tensors}


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter merged in. Exact only where the base has the precision.

    Raises ArtefactError for a prompt, which is no change of weights.
    """
    if model.active_peft_config.is_prompt_learning:
        raise ArtefactError("a prompt cannot be merged: load it with peft beside the base model")
    return model.merge_and_unload(safe_merge=True)


def adapter_hash(folder: Path) -> str:
    """sha256 over the tensors of a saved adapter. Raises ArtefactError when it has none."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtefactError(f"{folder} is no adapter: it has no adapter_model.safetensors")
    return tree.digest(codec.read(str(path))[0])


def base_of(folder: Path) -> str:
    """The base model of an adapter folder: a name, or a path that is told relative to the folder.

    Raises ArtefactError when it is no adapter.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder} is no adapter: it has no adapter_config.json with base_model_name_or_path"
        ) from error
    if not isinstance(name, str) or not name:
        raise ArtefactError(f"{folder} names no base model: name it with --model")
    beside = folder.resolve() / name
    return os.path.normpath(beside) if beside.exists() else name


def portable(name: str, folder: Path) -> str:
    """How an adapter in `folder` names a base model, so that no path of this machine is told.

    A name that others have stays; a path becomes relative to the folder, and where the two have no
    folder in common but the root, its last part alone, which whoever loads it has to find.
    """
    path, here = Path(name), folder.absolute()
    if not path.is_absolute():
        return name
    if path.parts[:2] != here.parts[:2]:
        return path.name
    return Path(os.path.relpath(path, here)).as_posix()


@contextmanager
def peft_speaks_to_transformers() -> Iterator[None]:
    """Silence peft 0.21, which asks transformers 5 for an attribute by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def _inputs_in_fp32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)
