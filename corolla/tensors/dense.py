"""Second opinions on low-rank arithmetic: the same with dense matrices in fp64.

What `corolla check` holds strategies against; nothing that trains or aggregates uses it.
"""

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
