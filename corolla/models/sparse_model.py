"""A model of which values at fixed places are trained, and saved as plain peft reads them.

An update of high rank at the bytes of LoRA; all other values of the base stay as they are, bit for
bit. Tensors are `<module>.delta` (k,); which places they are of is the model's own (`hold`). The
adapter is one of SHiRA, for models whose layers are all nn.Linear; others (Conv1D of GPT-2) are
saved whole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from corolla.errors import ModelError
from corolla.models import full, lora
from corolla.models.dense import DenseModel
from corolla.models.files import adapter_files
from corolla.models.pretrained import Base, heads_of
from corolla.models.sparse import places, shira
from corolla.models.sparse.shown import Shown, shown
from corolla.tensors import tree
from corolla.types import Adapter, LoraSpec, Params

_DELTA = ".delta"


class SparseModel(DenseModel):
    """One resident model with a sparse set, whose places are random until others are given."""

    def __init__(
        self,
        base: Base,
        rank: int,
        targets: Sequence[str] | None = None,
        blocks: str | None = None,
        seed: int = 0,
    ) -> None:
        """Rank · (out + in) values of each of `targets` (suffixes; None: all linear layers).

        `blocks`: in which blocks, as the key `layers` has them; None: in all. Raises ModelError as
        LoraModel does, for a rank larger than a module has values for, and for a base that is not
        in fp32: rounded to fewer bits, small changes would be lost.
        """
        self._rank, self._blocks, self._seed = rank, blocks, seed
        self._held = ""
        self.modules: dict[str, Shown] = {}
        """Module → its weight as it is shown."""
        self.sizes: dict[str, int] = {}
        """Module → the values that it has."""
        self.counts: dict[str, int] = {}
        """Module → the values of it that are trained."""
        if base.model.dtype != torch.float32:
            raise ModelError(f"parameters=sparse needs a base in float32, found {base.model.dtype}")
        super().__init__(base, "sparse", targets)

    def _added(self) -> Mapping[str, nn.Parameter]:
        self.targets = self.targets or lora.linear_suffixes(self.base)
        shapes = lora.targeted(self.base, self.targets, self._blocks)
        modules = {name: self.base.model.get_submodule(name) for name in shapes}
        weights = {name: module.weight for name, module in modules.items()}
        if odd := next((n for n, w in weights.items() if not w.is_floating_point()), None):
            raise ModelError(f"parameters=sparse needs a base that is not quantised: see {odd}")
        if len({weight.data_ptr() for weight in weights.values()}) < len(weights):
            raise ModelError("parameters=sparse needs modules that share no weight: choose targets")
        self.sizes = {name: weight.numel() for name, weight in weights.items()}
        self.counts = {n: places.count(n, shape, self._rank) for n, shape in shapes.items()}
        if not all(type(module) is nn.Linear for module in modules.values()):
            self.artefact = "model"
        first = places.random(self.sizes, self.counts, self._seed)
        self.modules = {name: shown(modules[name], first[name]) for name in shapes}
        return {name + _DELTA: own.delta for name, own in self.modules.items()}

    @property
    def places(self) -> dict[str, Tensor]:
        """Module → the places (k,) of its values that are trained, on the CPU."""
        return {name: own.places.cpu() for name, own in self.modules.items()}

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """Module → its weight in the base, with the changes that were shown last."""
        layers = {name: self.base.model.get_submodule(name) for name in self.modules}
        return {name: layer.parametrizations.weight.original for name, layer in layers.items()}

    def hold(self, given: Params) -> None:
        """Train values at these places (see places.packed) from now on; `write` comes after it.

        Raises WireError for places that are none of this model.
        """
        if (digest := tree.digest(given)) == self._held:
            return
        opened = places.opened(given, self.sizes, self.counts)
        for name, own in self.modules.items():
            own.move(opened[name])
        self._held = digest

    def init(self, spec: LoraSpec, seed: int) -> Params:
        """No change of any value; a classifier's head as it is."""
        zeros = {name + _DELTA: torch.zeros(k) for name, k in self.counts.items()}
        return {**super().init(spec, seed), **zeros}

    def deltas(self) -> Params:
        """The change of every module's weight, as the model computes with it, in fp64.

        Dense, in the form of the weight; a head by parameter. For checks and tests.
        """
        found: dict[str, Tensor] = {}
        for name, own in self.modules.items():
            weight = self.base.model.get_submodule(name).weight.detach().clone()
            before = weight.clone()
            before.view(-1)[own.places] = own.kept
            found[name] = (weight.double() - before.double()).cpu()
        heads = {n: p for n, p in self.parameters() if not n.endswith(_DELTA)}
        return found | {
            n: p.detach().cpu().double() - self._start[n].double() for n, p in heads.items()
        }

    def save(self, folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model: an adapter of SHiRA, or the whole model."""
        self.show(adapter, spec)
        if self.artefact == "model":
            return full.write_model(folder, self.model, self._shown())
        name = adapter_files.portable(self.base.name, folder)
        classify = self.base.task == "classify"
        config = shira.config(self._rank, list(self.modules), heads_of(self.base), classify, name)
        return adapter_files.write_adapter(folder, config, self._shown())

    def distance_to(self, folder: Path, spec: LoraSpec) -> float:
        """‖saved - shown‖ / ‖shown‖ in fp64, of the changes or of the whole model."""
        whole = self.artefact == "model"
        return super().distance_to(folder, spec) if whole else shira.distance(folder, self._shown())

    def _shown(self) -> dict[str, Tensor]:
        for own in self.modules.values():
            own.put()
        if self.artefact == "model":
            found = super()._shown()
            return {name: t for name, t in found.items() if not name.endswith(".weight.0.delta")}
        trained = dict(self.read())
        changes = {name: trained.pop(name + _DELTA) for name in self.modules}
        inputs = {
            name: int(self.base.model.get_submodule(name).in_features) for name in self.modules
        }
        named = {**trained, **shira.tensors(changes, self.places, inputs)}
        return {adapter_files.PREFIX + name: tensor for name, tensor in named.items()}

    def release(self) -> None:
        """Free the memory of all weights. Ends this object."""
        self.modules = {}
        super().release()
