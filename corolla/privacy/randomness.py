"""Randomness of privacy, from the operating system, and what scales it."""

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from corolla.types import Payload

Normal = Callable[[Sequence[int]], Tensor]
"""Shape → independent N(0, 1), fp64."""


Uniform = Callable[[int], Tensor]
"""n → independent uniform values in [0, 1), fp64 (n,)."""


NOISE = "privacy-noise-"
"""Groups of a server's memory: the clip of the next round; noise of so many rounds ago."""


SLICE = 1 << 20
"""Values that get their noise at a time: fp64 and what it is made of take 32 bytes each."""


def os_uniform(n: int) -> Tensor:
    """Uniform values in [0, 1), fp64 (n,): 53 bits each, all from the operating system."""
    words = np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53)


def os_normal(shape: Sequence[int]) -> Tensor:
    """N(0, 1) by Box and Muller (1958), fp64, from the operating system; at most 8.6 in size."""
    n = math.prod(shape)
    half = (n + 1) // 2
    radius = (1 - os_uniform(half)).log_().mul_(-2).sqrt_()  # of (0, 1]: never infinite
    angle = os_uniform(half).mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].reshape(tuple(shape))


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, clip / norm); 0 where the norm is not finite, 1 where it is 0."""
    factors = clip / norms.clamp(min=clip)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


def joint_norm(payload: Payload) -> Tensor:
    """The L2 norm over all tensors of all groups: fp64, no dimensions."""
    squares = [t.double().square().sum().cpu() for own in payload.values() for t in own.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
