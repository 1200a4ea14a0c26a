"""The share of a model's parameters that a run reaches, and the fused experts that stay frozen.

A mixture of experts keeps the weights of all experts of a layer in one tensor of three dimensions,
which is no linear layer: an adapter on all linear layers may reach a hundredth of such a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from corolla.models.experts import stacks
from corolla.tensors import factors

_SHOWN = 3
"""Names in a sentence."""
_WHOLE = (factors.A, factors.B, ".ia3")
"""Ends of the names of tensors by which every value of their layer's weight is moved."""
_ROWS = ".token_adapter.trainable_tokens_delta"
"""The end of the names of rows that are trained within a table of tokens."""


@dataclass(frozen=True)
class Parts:
    """The parameters of a base model before anything is added to it: name → values."""

    values: Mapping[str, int]
    experts: frozenset[str]
    """Names of the tensors that have the weights of several experts."""
    tied: Mapping[str, str]
    """Another name of a tensor → the name that it has in `values`."""


@dataclass(frozen=True)
class Reach:
    """The part of a model's parameters that a run can change."""

    values: int
    """Values of the base that can change, and virtual tokens, which stand before its input."""
    parameters: int
    frozen_experts: Sequence[str]
    frozen_values: int
    """Values of the frozen experts."""
    tied: Sequence[str]
    """Other names of the tensors that are trained as they are."""

    @property
    def share(self) -> float:
        """The part of all parameters that is reached."""
        return self.values / self.parameters

    @property
    def experts(self) -> str:
        """The end of a warning about fused experts; "" where none stay frozen."""
        if not self.frozen_experts:
            return ""
        more = len(self.frozen_experts) - _SHOWN
        names = ", ".join(self.frozen_experts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        part = self.frozen_values / self.parameters
        return f"fused experts stay frozen, {part:.0%} of the model's parameters ({names})"

    @property
    def line(self) -> str:
        """A sentence about the share."""
        reached = f"{self.values:,} of {self.parameters:,} parameters are reached"
        tied = f"; tied to what is trained: {', '.join(self.tied)}" if self.tied else ""
        return f"{reached}, {self.share:.1%}{tied}"

    def to_json(self) -> dict[str, Any]:
        """All fields, for run.json."""
        return asdict(self)


def parts(model: nn.Module) -> Parts:
    """The parameters of a base model, to which nothing has been added; a tied one counts once."""
    named = dict(model.named_parameters())
    first = {id(parameter): name for name, parameter in named.items()}
    others = model.named_parameters(remove_duplicate=False)
    return Parts(
        {name: _values(parameter) for name, parameter in named.items()},
        frozenset(stacks.stacks(model)),
        {name: first[id(parameter)] for name, parameter in others if name not in named},
    )


def of(base: Parts, trained: Mapping[str, int] | None) -> Reach:
    """The reach of trained tensors, name → values; None: everything.

    A tensor that is trained as it is counts as `corolla plan` does, with its own values: so do the
    places of a sparse set, the rows of new tokens, and virtual tokens. A factor or a scale counts
    with all values of the weight that it moves.
    """
    if trained is None:
        trained = base.values
    whole = {own for name in trained for own in _whole(name)} & base.values.keys()
    counted = {
        name: values
        for name, values in trained.items()
        if name not in base.values and not name.endswith(_WHOLE)
    }
    frozen = sorted(base.experts - whole)
    tables = {name.removesuffix(_ROWS) + ".weight" for name in counted if name.endswith(_ROWS)}
    as_they_are = trained.keys() | tables
    return Reach(
        sum(base.values[name] for name in whole) + sum(counted.values()),
        sum(base.values.values()),
        frozen,
        sum(base.values[name] for name in frozen),
        sorted(other for other, name in base.tied.items() if name in as_they_are),
    )


def _whole(name: str) -> set[str]:
    """The names that the tensor may have all of whose values a trained one changes."""
    for suffix in _WHOLE:
        if name.endswith(suffix):
            layer = name.removesuffix(suffix)
            return {f"{layer}.weight", layer.rpartition(".")[0]}  # of an expert: that of all
    return {name}


def _values(parameter: nn.Parameter) -> int:
    """Values of a parameter; one of 4 bits is packed."""
    packed = 2 * parameter.itemsize if type(parameter).__name__ == "Params4bit" else 1
    return parameter.numel() * packed
