"""Arithmetic over Params (tensor name → tensor). Results are new; inputs are never changed."""

import hashlib
import math
from collections.abc import Iterable

import torch

from corolla.types import Params, Payload


def add(a: Params, b: Params) -> Params:
    """A + b, name by name; both must have the same names."""
    return {name: a[name] + b[name] for name in _same_names(a, b)}


def sub(a: Params, b: Params) -> Params:
    """A - b, name by name; both must have the same names."""
    return {name: a[name] - b[name] for name in _same_names(a, b)}


def scale(a: Params, factor: float) -> Params:
    """Factor · a."""
    return {name: tensor * factor for name, tensor in a.items()}


def norm(a: Params) -> float:
    """The joint L2 norm over all tensors, in fp64."""
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in a.values()))


def count(a: Params) -> int:
    """The number of values."""
    return sum(tensor.numel() for tensor in a.values())


def clone(a: Params) -> Params:
    """A copy that shares no memory with `a`."""
    return {name: tensor.detach().clone() for name, tensor in a.items()}


def finite(a: Params) -> bool:
    """Returns whether every value is a finite number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in a.values())


def digest(a: Params) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(a):
        tensor = a[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def digest_all(payload: Payload) -> str:
    """sha256 (hex) over the groups of a payload, in the order of their names."""
    parts = (f"{group}:{digest(payload[group])}" for group in sorted(payload))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _same_names(a: Params, b: Params) -> Iterable[str]:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"trees differ in {len(odd)} names, first {odd[0]!r}")
    return a.keys()
