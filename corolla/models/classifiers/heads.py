"""New heads of classifiers whose checkpoints have trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # the classes of models take as long to import as torch
    from transformers import PreTrainedModel


def draw(model: PreTrainedModel, names: Sequence[str]) -> set[str]:
    """Draw the head of a classifier from torch's global state; the names of its tensors.

    `names` are its modules.
    """
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for name in names:
        for module in model.get_submodule(name).modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=spread)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return {f"{name}.{n}" for name in names for n in model.get_submodule(name).state_dict()}
