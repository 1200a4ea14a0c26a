"""How far two versions of a base are apart, beside what an adapter adds: each weight read once."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corolla.tensors import factors
from corolla.tensors.stored import StoredTensor
from corolla.types import Params


@dataclass
class Distance:
    """Sums over the modules of an adapter, while two checkpoints go by."""

    moved: float = 0.0
    """‖W_new - W_old‖² of the modules of the adapter."""
    added: float = 0.0
    """‖D‖² of the adapter."""
    cosines: list[float] = field(default_factory=list)
    """cos(W_new - W_old, D) of each module; those of equal weights, or of no D, are left out."""
    old: str = ""
    """sha256 of the old base's tensors; "" where it is not on this machine."""
    new: str = ""
    """sha256 of the new base's tensors."""

    @property
    def ratio(self) -> float | None:
        """‖W_new - W_old‖ / ‖D‖; None where it is not known, or D is zero."""
        return math.sqrt(self.moved / self.added) if self.old and self.added else None

    @property
    def cosine(self) -> float | None:
        """The mean over modules of cos(W_new - W_old, D); None where no module has one."""
        return math.fsum(self.cosines) / len(self.cosines) if self.cosines else None

    def to_json(self) -> dict[str, Any]:
        """For port.json."""
        return {
            "old_sha256": self.old or None,
            "new_sha256": self.new,
            "moved_over_adapter": self.ratio,
            "cosine": self.cosine,
        }


def measure(
    old: Mapping[str, StoredTensor] | None,
    new: Mapping[str, StoredTensor],
    named: Mapping[str, str],
    update: Params,
    transposed: bool,
) -> Distance:
    """The distance of two checkpoints; None: the old one is not on this machine.

    `named`: the weight's name in the new checkpoint → the module of `update`, factors of scaling 1;
    `transposed`: the layers keep (in, out). Every tensor is read once, a million values at a time,
    for its hash and for the distance.
    """
    found = Distance()
    hashes: dict[str, dict[str, str]] = {"old": {}, "new": {}}
    for name in sorted(new):
        before = old.get(name) if old else None
        alike = before if before is not None and before.shape == new[name].shape else None
        digests = hashlib.sha256(), hashlib.sha256()
        sums = torch.zeros(3, dtype=torch.float64)
        for first, rows, was in _together(new[name], alike):
            digests[0].update(_bytes(rows))
            if was is None:
                continue
            digests[1].update(_bytes(was))
            if name in named:
                sums += _sums(rows.double() - was.double(), first, named[name], update, transposed)
        hashes["new"][name] = digests[0].hexdigest()
        if alike is not None:
            hashes["old"][name] = digests[1].hexdigest()
        _note(found, sums)
    for name, tensor in sorted((old or {}).items()):
        if name not in hashes["old"]:
            digest = hashlib.sha256()
            for _, rows in tensor.rows():
                digest.update(_bytes(rows))
            hashes["old"][name] = digest.hexdigest()
    found.new = _hash(hashes["new"], new)
    found.old = _hash(hashes["old"], old) if old else ""
    return found


def _together(
    one: StoredTensor, other: StoredTensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first row, rows of one, the same rows of the other or None), in parts of equal rows."""
    if other is None:
        yield from ((first, rows, None) for first, rows in one.rows())
        return
    for (first, rows), (_, was) in zip(one.rows(), other.rows(), strict=True):
        yield first, rows, was


def _sums(moved: Tensor, first: int, module: str, update: Params, transposed: bool) -> Tensor:
    """‖W_new - W_old‖², ‖D‖² and their product, of some rows of a module."""
    left, right = update[module + factors.B].double(), update[module + factors.A].double()
    if transposed:
        left, right = right.T, left.T
    added = left[first : first + len(moved)] @ right
    return torch.stack([moved.square().sum(), added.square().sum(), (moved * added).sum()])


def _note(found: Distance, sums: Tensor) -> None:
    moved, added, both = (float(own) for own in sums)
    found.moved, found.added = found.moved + moved, found.added + added
    if moved and added:
        found.cosines.append(both / math.sqrt(moved * added))


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _hash(own: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> str:
    told = [[n, str(tensors[n].dtype), list(tensors[n].shape), own[n]] for n in sorted(own)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
