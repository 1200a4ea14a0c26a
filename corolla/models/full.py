"""All parameters of a base model, trained in place by moves along seeded directions.

The model is never copied: its weights are read again from the base model's files whenever they
are set, tensor by tensor, so that memory stays that of inference.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corolla.directions import moving
from corolla.directions.space import InPlace, Space
from corolla.errors import ArtefactError, ModelError
from corolla.host.files import making_folder
from corolla.models import devices
from corolla.models.files.folders import folder_of
from corolla.models.pretrained import Base, Quiet
from corolla.tensors.stored import StoredTensor, stored_tensors
from corolla.types import Adapter, LoraSpec, Move, Params

_BLOCK = 1 << 20
"""Values that are read from a file at a time."""


class FullModel:
    """One resident model whose parameters are those of the base model after some moves.

    Raises ModelError for a base with parameters that are no floating-point numbers (quantised).
    """

    artefact = "model"
    frozen: tuple[Params, ...] = ()

    def __init__(self, base: Base) -> None:
        self.base, self.model = base, base.model
        self.device = next(base.model.parameters()).device
        self.targets: list[str] = []
        named = sorted(base.model.named_parameters())
        odd = [name for name, tensor in named if not tensor.is_floating_point()]
        if odd:
            raise ModelError(f"parameters=full needs a base that is not quantised: see {odd[0]}")
        self._tensors: list[tuple[int, str, Tensor]] = []
        at = 0
        for name, tensor in named:
            self._tensors.append((at, name, tensor.data))
            at += tensor.numel()
        self.size = at
        self._origin = _Origin(base.path, {name: tensor.data for name, tensor in named})
        self._shown: str | None = moving.fingerprint(())

    @property
    def drifts(self) -> bool:
        """True where local steps in place are lost by rounding: a base in half precision."""
        return bool(self.model.dtype != torch.float32)

    @property
    def kept_bytes(self) -> int:
        """Bytes of base tensors that are in no file of the model and had to be copied."""
        return self._origin.kept_bytes

    def check_rank(self, spec: LoraSpec) -> None:
        """Any: there is no adapter."""

    def init(self, spec: LoraSpec, seed: int) -> Params:
        """Empty: there is no adapter."""
        return {}

    def read(self) -> Params:
        """Empty: all parameters are not copied."""
        return {}

    def show(self, adapter: Adapter, spec: LoraSpec) -> None:
        """Set all parameters to those of the base model after the adapter's moves."""
        wanted = moving.fingerprint(adapter.moves)
        if wanted != self._shown:
            self._shown = None  # in case it is interrupted half-way
            self._settle(adapter.moves)
            self._shown = wanted

    def enter(self, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        """The space of all parameters, standing at the base model after `moves`."""
        self.show(Adapter({}, moves=tuple(moves)), spec)
        self._shown = None
        return InPlace([(at, tensor) for at, _, tensor in self._tensors])

    def unmoved(self, eps: float) -> float:
        """The part of the weights that a perturbation of eps leaves as they are, by rounding.

        Looks at the first 65,536 values of each tensor.
        """
        same = total = 0
        for _, _, tensor in self._tensors:
            part = tensor.view(-1)[: 1 << 16]
            moved = (part.float() + eps).to(part.dtype)
            same += int((moved == part).sum())
            total += part.numel()
        return same / total

    def save(self, folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
        """Write the whole model in its own type, as transformers loads it."""
        self.show(adapter, spec)
        write_model(folder, self.model)

    def distance_to(self, folder: Path, spec: LoraSpec) -> float:
        """How far a saved model is from the one that is shown: see `distance`."""
        return distance(folder, {name: tensor for _, name, tensor in self._tensors})

    def release(self) -> None:
        """Free the memory of all weights. Ends this object."""
        self._tensors, self._shown = [], None
        devices.free(self.model)

    def digest(self, folder: Path) -> str:
        """sha256 over the weight files of a saved model, in the order of their names."""
        return digest(folder)

    def _settle(self, moves: Sequence[Move]) -> None:
        apply = moving.prepared(moves)
        for at, name, tensor in self._tensors:
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), _BLOCK):
                stop = min(start + _BLOCK, flat.numel())
                source = self._origin.read(name, start, stop).to(self.device, tensor.dtype)
                apply(flat[start:stop], at + start, source)


def write_model(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """A model folder, whole or not at all; `tensors` in place of the model's own state.

    Its type, in config.json, is that of the first tensor.
    """
    with making_folder(folder) as scratch:
        with Quiet():
            model.save_pretrained(scratch, state_dict=dict(tensors) if tensors else None)
        if tensors:
            model.config.dtype = next(iter(tensors.values())).dtype
            model.config.save_pretrained(scratch)


def distance(folder: Path, shown: Mapping[str, Tensor]) -> float:
    """‖saved - shown‖ / ‖shown‖ in fp64, over the tensors that are saved by their names.

    Infinite when there is none. transformers stores some in another form (experts).
    """
    files = _files(folder)
    lost = total = 0.0
    for name in shown.keys() & files.keys():
        flat = shown[name].reshape(-1)
        for start in range(0, flat.numel(), _BLOCK):
            stop = min(start + _BLOCK, flat.numel())
            own = flat[start:stop].cpu().double()
            saved = files[name].read(start, stop).double()
            lost += float((saved - own).square().sum())
            total += float(own.square().sum())
    return math.sqrt(lost / total) if total else math.inf


def digest(folder: Path) -> str:
    """sha256 (hex) over the weight files of a model folder. Raises ArtefactError without any."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ArtefactError(f"{folder} is no saved model: it has no .safetensors file")
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


class _Origin:
    """The base weights, from the files they came from, or copies of those that are in none."""

    def __init__(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        files = _files(folder_of(path))
        self._stored: dict[str, StoredTensor] = {}
        self._kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stored = files.get(name)
            if stored and stored.shape == tuple(tensor.shape) and _same(stored, tensor):
                self._stored[name] = stored
            else:  # a new classifier head, a checkpoint in another form
                self._kept[name] = tensor.reshape(-1).cpu().clone()
        self.kept_bytes = sum(t.numel() * t.element_size() for t in self._kept.values())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values start … stop of a base tensor, flattened, in the type they are stored in."""
        if name in self._kept:
            return self._kept[name][start:stop]
        return self._stored[name].read(start, stop)


def _same(stored: StoredTensor, tensor: Tensor) -> bool:
    """Bit for bit, after the cast to the type of the model."""
    flat = tensor.view(-1)
    if stored.path.stat().st_size < stored.at + flat.numel() * stored.dtype.itemsize:
        return False
    for start in range(0, flat.numel(), _BLOCK):
        stop = min(start + _BLOCK, flat.numel())
        if not torch.equal(stored.read(start, stop).to(flat.dtype), flat[start:stop].cpu()):
            return False
    return True


def _files(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files of a folder, by name."""
    paths = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}
