"""A model that clients train and servers evaluate: an adapter on it, or some of its tensors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from corolla.config.run import RunConfig
from corolla.directions.space import Space
from corolla.models import kinds
from corolla.models.dense import DenseModel
from corolla.models.full import FullModel
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.types import Adapter, LoraSpec, Move, Params


class Trainable(Protocol):
    """A resident model, by what workers and evaluators ask of it."""

    artefact: str
    base: Base
    model: Any
    device: torch.device
    targets: list[str]

    @property
    def drifts(self) -> bool:
        """True where weights that are moved in place lose small moves by rounding."""

    @property
    def frozen(self) -> tuple[Params, ...]:
        """The frozen blocks in use."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights that are kept in memory twice, for no file of the model has them."""

    def unmoved(self, eps: float) -> float:
        """The part of the trained values that a perturbation of eps leaves as they are."""

    def check_rank(self, spec: LoraSpec) -> None:
        """Raises ModelError for a rank larger than a module can have."""

    def init(self, spec: LoraSpec, seed: int) -> Params:
        """A fresh adapter; empty when all parameters are trained."""

    def show(self, adapter: Adapter, spec: LoraSpec) -> None:
        """Set every weight to those of a global model."""

    def enter(self, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        """The space of the trained tensors, standing at `start` after `moves`."""

    def read(self) -> Params:
        """A copy of all tensors of the adapter, on the CPU."""

    def save(self, folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model so that other tools load it."""

    def distance_to(self, folder: Path, spec: LoraSpec) -> float:
        """How far a saved model is from the one that is shown: relative, in fp64."""

    def release(self) -> None:
        """Free the memory of all weights. Ends this object."""

    def digest(self, folder: Path) -> str:
        """sha256 of the tensors of a saved model."""


@runtime_checkable
class Differentiable(Trainable, Protocol):
    """A resident model whose trained tensors can have gradients."""

    def write(self, params: Params, spec: LoraSpec, frozen: Sequence[Params] = ()) -> None:
        """Set every trained tensor, every buffer and the frozen blocks, from nothing else."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained tensors by name, in the order of names."""


def sizes(model: Trainable) -> dict[str, int] | None:
    """Trained tensors, name → values; None for a model of which all are moved in place.

    Factors have a rank only once they are written.
    """
    if not isinstance(model, Differentiable):
        return None
    return {name: parameter.numel() for name, parameter in model.parameters()}


def build(config: RunConfig, base: Base) -> LoraModel | FullModel | DenseModel:
    """The resident model of a run. Raises ModelError when the base cannot carry what is asked."""
    return kinds.of(config).build(config, base)
