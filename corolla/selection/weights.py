"""Scores of the values of weight matrices, by the weights alone or by an adapter on them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from corolla.artefacts.adapters import read_lora
from corolla.errors import ConfigError
from corolla.models.sparse_model import SparseModel
from corolla.tensors import factors


def magnitude(model: SparseModel) -> Iterator[tuple[str, Tensor]]:
    """(module, |W|) of all modules: a simple choice, and a poor one (Liu et al., LIFT)."""
    for name, weight in model.originals.items():
        yield name, weight.detach().abs()


def principal(model: SparseModel, spectrum: int) -> Iterator[tuple[str, Tensor]]:
    """(module, |W_f|), W_f the best approximation of W of rank f = `spectrum`.

    Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
    Reasoning-Focused Supervised Fine-Tuning", ICML 2025, arXiv 2506.00772. The places do not change
    in a run.
    """
    for name, weight in model.originals.items():
        found = weight.detach()
        if spectrum < min(found.shape):
            u, s, vt = torch.linalg.svd(found, full_matrices=False)
            found = (u[:, :spectrum] * s[:spectrum]) @ vt[:spectrum]
        yield name, found.abs()


def movement(model: SparseModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(module, |s B A|) of a LoRA adapter of the same base: where an exploration has moved it.

    Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (LT-SFT), ACL 2022,
    arXiv 2110.07560, take the values that full fine-tuning has moved most; an exploration by LoRA
    costs a federation the bytes of LoRA. One product exists at a time.

    Raises ArtefactError for what is no LoRA adapter, ConfigError for one of other modules.
    """
    update = read_lora(folder).baked
    for name, weight in model.originals.items():
        if name + factors.A not in update:
            raise ConfigError(
                f"explored={folder} has no change of {name}, whose values are to be trained: give "
                f"target-modules that it has"
            )
        found = factors.product(update, name)
        found = found.T if isinstance(model.base.model.get_submodule(name), Conv1D) else found
        if found.shape != weight.shape:
            raise ConfigError(f"explored={folder} is of another base: {name} has another shape")
        yield name, found.abs().float()
