"""Supports of top_k: which values are sent, of all or of the factors of each role apart.

Values are flat, in consecutive parts; a support is of one part, its indices count from its first
value. Bytes that came over a network are read by `load`: WireError when they are malformed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from corolla.tensors import factors
from corolla.wire import packing


@dataclass(frozen=True)
class Part:
    """Consecutive values, of which `kept` are sent: all, or the largest and where they are."""

    count: int
    kept: int

    @property
    def indexed(self) -> bool:
        """True where the support is indices, which int32 reaches, and not a bitmap."""
        return 4 * self.kept < -(-self.count // 8) and self.count < 1 << 31

    @property
    def support(self) -> int:
        """Bytes that say which values are sent."""
        if self.kept == self.count:
            return 0
        return 4 * self.kept if self.indexed else -(-self.count // 8)


def role(name: str) -> int:
    """Returns 0 of a factor A, 1 of a factor B, 2 of anything else."""
    return 0 if factors.is_a(name) else 1 if factors.is_b(name) else 2


def parts(
    sizes: Mapping[tuple[str, str], int], density: Fraction | None, roles: bool
) -> list[Part]:
    """One part of all values or, with `roles`, one of each role, of tensors in this order.

    `sizes` are values by (group, name). Of a part ⌊density · count⌋ values are sent, at least one;
    with `roles` all of what is no factor, since its 0 is not neutral.
    """
    counts: dict[int, int] = {}
    for (_, name), size in sizes.items():
        own = role(name) if roles else 0
        counts[own] = counts.get(own, 0) + size
    if density is None:
        return [Part(count, count) for count in counts.values()]
    return [
        Part(count, count if own > 1 else min(count, max(1, int(density * count))))
        for own, count in counts.items()
    ]


def largest(values: Tensor, among: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """(Indices into `values` of what is sent, ascending; the supports as they travel)."""
    found, sent, at = [], [], 0
    for part in among:
        own = torch.arange(part.count)
        if part.support:
            own = packing.largest(values[at : at + part.count], part.kept)
            sent.append(packing.dump_support(own, part.count, part.indexed))
        found.append(own + at)
        at += part.count
    return torch.cat(found), sent


def load(data: Tensor, among: Sequence[Part]) -> Tensor:
    """The indices of `largest`, from its supports. Raises WireError when these are malformed."""
    found, at = [], 0
    pieces = torch.split(data, [part.support for part in among])
    for part, piece in zip(among, pieces, strict=True):
        own = torch.arange(part.count)
        if part.support:
            own = packing.load_support(piece, part.count, part.kept, part.indexed)
        found.append(own + at)
        at += part.count
    return torch.cat(found)
