"""Heads of classifiers, which are trained as they are: merged where labels agree, and balanced.

Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR
2024, arXiv 2401.08977: rows of a head that was trained on skewed labels are longer for frequent
ones; it divides each by its length.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.errors import ArtefactError, ConfigError
from corolla.types import Params


def merge(heads: Sequence[Params], weights: Sequence[float]) -> Params:
    """Σ_j w_j H_j in fp64. Raises ArtefactError where heads are unlike, ConfigError for weights.

    The weights must have the sum 1: a head takes the place of the base's, it is no difference.
    """
    if any(head.keys() != heads[0].keys() for head in heads):
        raise ArtefactError("adapters with heads of other names, or with and without, do not merge")
    for name in heads[0]:
        if len({head[name].shape for head in heads}) > 1:
            raise ArtefactError(f"heads do not merge: {name} is of another shape in each")
    if heads[0] and len(heads) > 1 and not math.isclose(sum(weights), 1.0):
        raise ConfigError(
            f"--steps weights: adapters with a head need weights of sum 1, found {sum(weights):g}"
        )
    if len(heads) == 1:
        return heads[0]
    found = {}
    for name in heads[0]:
        parts = [own * head[name].double() for own, head in zip(weights, heads, strict=True)]
        found[name] = torch.stack(parts).sum(0).to(heads[0][name].dtype)
    return found


def balance(head: Params, labels: int) -> Params:
    """The last layer's rows, one a label, all of their mean length: the directions stay.

    The paper's rows have length 1: the mean length keeps the scale of the logits. Raises
    ArtefactError where no single matrix has a row for each label.
    """
    last = [name for name, own in head.items() if own.dim() == 2 and len(own) == labels]
    if len(last) != 1:
        raise ArtefactError(
            f"balance-head needs a classifier's head with one matrix of {labels or 'its'} labels, "
            f"found {', '.join(sorted(head)) or 'no head'}"
        )
    return {**head, last[0]: _balanced(head[last[0]])}


def _balanced(matrix: Tensor) -> Tensor:
    lengths = matrix.double().norm(dim=1, keepdim=True)
    scale = torch.where(lengths > 0, lengths.mean() / lengths, 1.0)
    return (matrix.double() * scale).to(matrix.dtype)
