"""A base model's weights as they lie on disk, with an adapter's update added while they are read.

No model is built: memory is that of a million values, or of one tensor where a whole one is asked
for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla.errors import ArtefactError
from corolla.models.files.folders import folder_of
from corolla.tensors import factors
from corolla.tensors.stored import StoredTensor, stored_tensors
from corolla.types import Params


@dataclass(frozen=True)
class Rounding:
    """The sums of squares of an update, and of what is lost of it when weights are rounded."""

    update: float = 0.0
    lost: float = 0.0

    @property
    def share(self) -> float:
        """‖lost‖_F / ‖update‖_F over all modules; 0 without an update."""
        return float((self.lost / self.update) ** 0.5) if self.update else 0.0

    def plus(self, update: float, lost: float) -> "Rounding":
        """The sums with those of another part."""
        return Rounding(self.update + update, self.lost + lost)


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by name, and the update of some as factors."""

    tensors: Mapping[str, StoredTensor]
    update: Mapping[str, tuple[Tensor, Tensor]]
    """Name → (left (rows, r), right (r, columns)) in fp64: their product is added."""

    def parts(self, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(rows as stored, their update in fp64 or None), from the first row to the last."""
        factor = self.update.get(name)
        for first, rows in self.tensors[name].rows():
            if factor is None:
                yield rows, None
            else:
                left, right = factor
                yield rows, left[first : first + len(rows)] @ right

    def whole(self, name: str) -> Tensor:
        """One tensor with its update, in fp32: added in fp64, rounded once."""
        out = torch.empty(self.tensors[name].shape, dtype=torch.float32)
        first = 0
        for rows, added in self.parts(name):
            if not rows.dim():
                return rows.float()
            wanted = rows if added is None else rows.double() + added
            out[first : first + len(rows)] = wanted.float()
            first += len(rows)
        return out


def open_weights(base: str, update: Params, transposed: bool = False) -> Weights:
    """The weights of a base model (a folder, or a hub name that is in the cache) plus `update`.

    `update` holds factors of scaling 1 by module; `transposed`: the layers keep (in, out), as
    Conv1D does. Raises ArtefactError for a checkpoint that is quantised, not in safetensors files,
    or lacks a module.
    """
    folder = folder_of(base)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ArtefactError(
            f"{base} has no .safetensors files to read weights from: save it with save_pretrained"
        )
    if _config(folder).get("quantization_config"):
        raise ArtefactError(f"{base} is quantised: give the model it was made from with --model")
    tensors = {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}
    added = {}
    for module in factors.modules(update):
        name = _stored_name(module, tensors, base)
        left, right = update[module + factors.B].double(), update[module + factors.A].double()
        if transposed:
            left, right = right.T, left.T
        found = tensors[name].shape
        if found != (left.shape[0], right.shape[1]):
            raise ArtefactError(
                f"the adapter's {module} is {left.shape[0]} x {right.shape[1]}, {name} of {base} "
                f"is {found}: it was trained on another model, name it with --model"
            )
        added[name] = (left, right)
    return Weights(tensors, added)


def _stored_name(module: str, tensors: Mapping[str, StoredTensor], base: str) -> str:
    """The name in a checkpoint, which may lack the prefix of the model that it is a part of."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in tensors:
            return name
    raise ArtefactError(f"{base} has no tensor {module}.weight: name the right base with --model")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} is no model: {error}") from error
    return found
