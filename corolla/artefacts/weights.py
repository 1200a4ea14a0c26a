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


def open_tensors(base: str) -> dict[str, StoredTensor]:
    """The tensors of a model (a folder, or a hub name that is in the cache), by name.

    Raises ArtefactError for a checkpoint that is quantised or not in safetensors files.
    """
    folder = folder_of(base)
    if not folder.is_dir():
        raise ArtefactError(
            f"{base} is no folder and no model on this machine: check the name, or download it"
        )
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ArtefactError(
            f"{base} has no .safetensors files to read weights from: save it with save_pretrained"
        )
    if _config(folder).get("quantization_config"):
        raise ArtefactError(f"{base} is quantised: give the model it was made from with --model")
    return {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}


@dataclass(frozen=True)
class StoredModules:
    """The weights of a model's linear layers, read a module at a time."""

    tensors: Mapping[str, StoredTensor]
    """Module → its weight."""
    transposed: bool
    """True where the layers keep (in, out), as Conv1D does."""

    def whole(self, module: str) -> Tensor:
        """The weight of a module, (out, in) in fp32."""
        own = self.tensors[module]
        weight = own.read(0, own.count).reshape(own.shape).float()
        return weight.T if self.transposed else weight


def open_modules(
    base: str, shapes: Mapping[str, tuple[int, int]], transposed: bool = False
) -> StoredModules:
    """The weights of modules (name → (out, in)) of a model.

    Raises ArtefactError as `open_tensors` does, for a module that is not there, and for one of
    another shape.
    """
    tensors = open_tensors(base)
    found = {}
    for module, (out, into) in shapes.items():
        name = stored_name(module, tensors, base)
        check_shape(module, (out, into), tensors[name].shape, base, transposed)
        found[module] = tensors[name]
    return StoredModules(found, transposed)


def check_shape(
    module: str,
    wanted: tuple[int, int],
    found: tuple[int, ...],
    base: str,
    transposed: bool = False,
) -> None:
    """Raises ArtefactError for a weight that is not of the shape (out, in) of an adapter."""
    if found != (wanted[::-1] if transposed else wanted):
        raise ArtefactError(
            f"the adapter's {module} is {wanted[0]} x {wanted[1]}, its weight in {base} is "
            f"{' x '.join(map(str, found))}: it was trained on another model, name it with --model"
        )


def open_weights(base: str, update: Params, transposed: bool = False) -> Weights:
    """The weights of a base model (a folder, or a hub name that is in the cache) plus `update`.

    `update` holds factors of scaling 1 by module; `transposed`: the layers keep (in, out), as
    Conv1D does. Raises ArtefactError for a checkpoint that is quantised, not in safetensors files,
    or lacks a module.
    """
    tensors = open_tensors(base)
    added = {}
    for module in factors.modules(update):
        name = stored_name(module, tensors, base)
        left, right = update[module + factors.B].double(), update[module + factors.A].double()
        wanted = (left.shape[0], right.shape[1])
        check_shape(module, wanted, tensors[name].shape, base, transposed)
        if transposed:
            left, right = right.T, left.T
        added[name] = (left, right)
    return Weights(tensors, added)


def stored_name(module: str, tensors: Mapping[str, StoredTensor], base: str) -> str:
    """The name of a module's weight in a checkpoint. Raises ArtefactError where there is none."""
    if name := weight_of(module, tensors):
        return name
    raise ArtefactError(f"{base} has no tensor {module}.weight: name the right base with --model")


def weight_of(module: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The same; None where there is none.

    A checkpoint may lack the prefix of the model that it is a part of.
    """
    names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
    return next((name for name in names if name in tensors), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} is no model: {error}") from error
    return found
