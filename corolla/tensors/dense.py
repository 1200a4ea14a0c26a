"""Second opinions on low-rank arithmetic: the same with dense matrices in fp64.

What `corolla check` holds strategies against; nothing that trains or aggregates uses it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def cut(whole: Tensor, rank: int | None = None, energy: float = 1.0) -> tuple[Tensor, int]:
    """The best approximation of `whole` (Eckart and Young) and its rank.

    Of rank at most `rank`; with `energy` below 1, of the smallest rank whose squared singular
    values are at least that part of all.
    """
    u, s, vt = torch.linalg.svd(whole.double(), full_matrices=False)
    keep = min(len(s), rank or len(s))
    if energy < 1:
        parts = s.square().cumsum(0) / s.square().sum().clamp(min=1e-300)
        keep = min(keep, int((parts < energy).sum()) + 1)
    return (u[:, :keep] * s[:keep]) @ vt[:keep], keep


class DenseBlocks:
    """The sum of frozen blocks in each module (out, in), by the rule of corolla.tensors.blocks.

    Their ranks are those that the factors have, which decide when all are cut to `max_rank`.
    """

    def __init__(self, max_rank: int | None, compact_at: float) -> None:
        self.max_rank, self.compact_at = max_rank, compact_at
        self.sums: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}

    def append(self, block: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        """Add the block of a round, whose factors have `ranks`."""
        for module, added in block.items():
            self.sums[module] = self.sums.get(module, 0) + added
            self.ranks[module] = self.ranks.get(module, 0) + ranks[module]
        full = max(min(added.shape) for added in self.sums.values())
        if max(self.ranks.values()) <= self.compact_at * min(self.max_rank or full, full):
            return
        for module, added in self.sums.items():
            most = min(self.max_rank or full, self.ranks[module], *added.shape)
            self.sums[module], self.ranks[module] = cut(added, most)
