"""Weights that a checkpoint lacks: modules that a run trains and saves whole, and all others.

transformers draws what it does not find from torch's global state: another process has other
weights there, and an adapter that does not bring them along means another model for everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from corolla.errors import ModelError

if TYPE_CHECKING:  # the classes of models take as long to import as torch
    from transformers import PreTrainedModel

_SHOWN = 3
"""Names of tensors in a refusal."""


def within(name: str, modules: Iterable[str]) -> bool:
    """Returns whether a tensor or module is one of `modules` or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def outside(model: PreTrainedModel) -> list[str]:
    """Modules with parameters outside the backbone of a classifier: its head."""
    return [
        name
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    ]


def poolers(model: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """Modules between the layers of a classifier and its head that the checkpoint has nothing of.

    A pooler is a child of the backbone behind its layers, and linear throughout. Masked language
    models are saved without one (BERT, ALBERT).
    """
    children = list(model.base_model.named_children())
    stacks = [i for i, (_, child) in enumerate(children) if _has_layers(child)]
    if not stacks:
        return []
    named = ((f"{model.base_model_prefix}.{n}", child) for n, child in children[stacks[-1] + 1 :])
    return [name for name, child in named if _is_new(name, child, missing)]


def refuse(
    source: str, missing: Collection[str], trained: Sequence[str], found: Collection[str]
) -> None:
    """Raise ModelError for tensors that a checkpoint lacks and that are in no trained module.

    `found` are the names of tensors that the checkpoint has and the model does not.
    """
    odd = sorted(name for name in missing if not within(name, trained))
    if not odd:
        return
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    instead = f"; it has {min(found)} instead" if found else ""
    raise ModelError(
        f"checkpoint {source} lacks {', '.join(odd[:_SHOWN])}{more}{instead}: random weights would "
        f"take their place, others in each process; give a checkpoint of this class with these "
        f"tensors, under these names"
    )


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def _is_new(name: str, module: nn.Module, missing: Collection[str]) -> bool:
    """Returns whether a module can be trained as it is and the checkpoint has none of it."""
    own = dict(module.named_parameters())
    with_parameters = [
        part for part in module.modules() if any(True for _ in part.parameters(False))
    ]
    return (
        bool(own)
        and all(f"{name}.{parameter}" in missing for parameter in own)
        and all(isinstance(part, nn.Linear) for part in with_parameters)
        and all(parameter.is_floating_point() for parameter in own.values())
    )
