"""Tensors as one vector of a secure sum, and such a vector as tensors again."""

import numpy as np
import torch
from numpy.typing import NDArray

from corolla.tensors import tree
from corolla.types import Payload


def flatten(payload: Payload) -> NDArray[np.float64]:
    """All values (d,) in fp64, by the names of groups and of tensors."""
    parts = [
        payload[group][name].detach().double().cpu().reshape(-1)
        for group in sorted(payload)
        for name in sorted(payload[group])
    ]
    return torch.cat(parts).numpy() if parts else np.zeros(0)


def unflatten(vector: NDArray[np.float64], like: Payload) -> Payload:
    """The tensors of a vector, in the form of `like` and in fp64."""
    values, place = torch.from_numpy(vector), 0
    found: dict[str, dict[str, torch.Tensor]] = {group: {} for group in like}
    for group in sorted(like):
        for name in sorted(like[group]):
            tensor = like[group][name]
            found[group][name] = values[place : place + tensor.numel()].reshape(tensor.shape)
            place += tensor.numel()
    return found


def count(payload: Payload) -> int:
    """Values of all tensors."""
    return sum(map(tree.count, payload.values()))
