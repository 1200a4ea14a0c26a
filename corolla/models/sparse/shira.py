"""The files of a sparse set as plain peft reads them: an adapter of SHiRA.

Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175. peft stores the places
beside the changes, and goes by the stored ones.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import ShiraConfig, TaskType
from torch import Tensor

from corolla.tensors import tree
from corolla.types import Params
from corolla.wire import codec


def config(
    rank: int, modules: Sequence[str], heads: Sequence[str], classify: bool, base: str
) -> ShiraConfig:
    """The content of adapter_config.json; `modules` by their full names, so that no other is meant.

    `base` is what the base model is called there.
    """
    return ShiraConfig(
        r=rank,
        target_modules=list(modules),
        modules_to_save=list(heads) or None,
        task_type=TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base,
    )


def tensors(changes: Params, places: Params, inputs: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors by the names of peft, from those by module; `inputs` are the columns of each."""
    found: dict[str, Tensor] = {}
    for name, at in places.items():
        rows = torch.stack([at // inputs[name], at % inputs[name]])
        found[f"{name}.shira_weight"] = changes[name]
        found[f"{name}.shira_indices"] = rows.to(torch.int32)
    return found


def distance(folder: Path, wanted: Params) -> float:
    """‖saved - wanted‖ / ‖wanted‖ in fp64, of the changes; infinite where a place differs."""
    saved, _ = codec.read(str(folder / "adapter_model.safetensors"))
    moved = {name: t for name, t in wanted.items() if t.is_floating_point()}
    if saved.keys() != wanted.keys() or any(
        not torch.equal(saved[name], wanted[name]) for name in wanted.keys() - moved.keys()
    ):
        return math.inf
    lost = tree.norm({n: saved[n].double() - t.double() for n, t in moved.items()})
    return lost / tree.norm(moved) if lost else 0.0
