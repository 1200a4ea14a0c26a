"""The job that all steps of an edit share: the modules, the base, and what was cut."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from corolla.artefacts.weights import StoredModules, open_modules
from corolla.edits.ranks import Cut
from corolla.errors import ArtefactError, ModelError
from corolla.models import anatomy
from corolla.models.pretrained import resolve
from corolla.tensors.units import block


@dataclass
class Job:
    """An edit: the shapes of its modules, its base model, and what its steps have cut."""

    base: str
    """The base model, as `open_modules` takes it: a folder or the name of one."""
    shapes: Mapping[str, tuple[int, int]]
    """Module → (out, in)."""
    rank: int
    """The largest rank of the adapters."""
    transposed: bool = False
    """True where the layers keep (in, out), as Conv1D does."""
    some_blocks: bool = False
    """True where the adapters were asked for some blocks of their base alone."""
    cuts: list["Cuts"] = field(default_factory=list)
    """The steps that cut, in their order."""
    changed: list[int] = field(default_factory=list)
    """In how many modules each step has changed something."""

    @cached_property
    def weights(self) -> StoredModules:
        """The weights of the base. Raises ArtefactError or ModelError where they are not there."""
        return self.open(self.base)

    def open(self, model: str) -> StoredModules:
        """The weights of the modules in a model. Raises as `weights` does."""
        return open_modules(resolve(model), self.shapes, self.transposed)

    @cached_property
    def blocks(self) -> int:
        """How many blocks the base has: by its files, or by an adapter that is on all of them."""
        try:
            return anatomy.read(self.base).layers
        except ModelError as error:
            if self.some_blocks:
                raise ArtefactError(
                    f"lines needs the number of blocks of the base: {error}"
                ) from error
        numbers = [place[1] for name in self.shapes if (place := block(name))]
        return 1 + max(numbers, default=-1)

    def cutting(self, step: str) -> "Cuts":
        """The record of one more step that cuts, to be filled module by module."""
        self.cuts.append(Cuts(step))
        return self.cuts[-1]

    @property
    def error(self) -> float:
        """The largest error of the steps that cut; 0 where none did."""
        return max((own.error for own in self.cuts), default=0.0)


@dataclass
class Cuts:
    """The squares of singular values that one step has cut, and of all, over all adapters."""

    step: str
    lost: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def note(self, module: str, cut: Cut) -> None:
        """Add the cut of one module."""
        self.lost[module] = self.lost.get(module, 0.0) + cut.lost
        self.total[module] = self.total.get(module, 0.0) + cut.total

    @property
    def error(self) -> float:
        """‖exact - cut‖_F / ‖exact‖_F over all modules."""
        total = math.fsum(self.total.values())
        return math.sqrt(math.fsum(self.lost.values()) / total) if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """For edit.json: the step, its error, and that of each module."""
        of_modules = {
            name: math.sqrt(self.lost[name] / total) if total else 0.0
            for name, total in sorted(self.total.items())
        }
        return {"step": self.step, "error": self.error, "error_of_modules": of_modules}


def weight(modules: StoredModules, name: str) -> Tensor:
    """The weight of a module, (out, in) in fp64."""
    return modules.whole(name).to(torch.float64)
