"""Seeded directions and moves along them: what a zeroth-order client needs instead of gradients.

All trained tensors, sorted by name, row-major and concatenated, are one flat vector of d values. A
pool names directions z_k of it by a seed; a `Move` adds Σ_k a_k z_k.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corolla import seeds
from corolla.directions import signs

_BLOCK = 1 << 16
"""Gaussian values are drawn in blocks of this many, each seekable by itself."""
_GAUSSIAN = 2
"""Stream number of Gaussian blocks; 0 and 1 are those of signs.py."""


@dataclass(frozen=True)
class SignPool:
    """Sign-Hadamard directions: z_k[i] = D[i] · (-1)^popcount(k & i), for 0 ≤ k < size.

    Inside every full block of `size` values they are exactly orthogonal, and E[z zᵀ] = I. A move
    along any number of them is one pass over the weights. Raises ValueError unless `size` is a
    power of two.
    """

    size: int
    key: signs.Key

    def __post_init__(self) -> None:
        check_power_of_two(self.size)

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        signs.add(out, self.key, offset, terms, source)


@dataclass(frozen=True)
class GaussianPool:
    """Standard normal directions, as in MeZO and FedKSeed: as many as there are seeds.

    Every direction of a move costs as many random numbers as there are weights. Values come from
    NumPy's ziggurat on Philox4x64, block by block, so that any slice can be drawn by itself. NumPy
    may change it in a later version: all devices of a federation need the same one. Signs do not
    have that limit.
    """

    seed: int

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        by_block(out, offset, source, lambda values, at: self._add(values, at, terms))

    def _add(self, values: Tensor, at: int, terms: Sequence[tuple[int, float]]) -> None:
        for k, scale in terms:
            scaled = np.float32(scale) * self.values(k, at, at + len(values)).numpy()
            values += torch.from_numpy(scaled).to(values.device)

    def values(self, k: int, start: int, stop: int) -> Tensor:
        """z_k[start:stop] in fp32."""
        parts = []
        for block in range(start // _BLOCK, (stop - 1) // _BLOCK + 1):
            last = min(stop - block * _BLOCK, _BLOCK)
            parts.append(self._block(k, block, last)[max(0, start - block * _BLOCK) :])
        return torch.from_numpy(np.concatenate(parts))

    def _block(self, k: int, block: int, count: int) -> NDArray[np.float32]:
        """The first `count` values of a block: whoever draws fewer sees the same ones."""
        counter = np.array([0, block, _GAUSSIAN, 0], dtype=np.uint64)
        bits = np.random.Philox(key=np.array([self.seed, k], dtype=np.uint64), counter=counter)
        return np.random.Generator(bits).standard_normal(count, dtype=np.float32)


@dataclass(frozen=True)
class LowRankPool:
    """Matrices of low rank: z_k = U_k Vᵀ / sqrt(rank) for a matrix, Gaussian for a vector.

    U is new for each k, V for each `interval` of k. Both follow from k alone: the direction of an
    update is that of its perturbation at every step, also where V changes. Chen et al., "Enhancing
    Zeroth-order Fine-tuning for Language Models with Low-rank Structures" (LOZO), ICLR 2025,
    arXiv 2410.07698. Holds one direction, d values, in memory; `out` is the whole flat vector.
    """

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    rank: int
    interval: int

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        if offset or out.numel() != sum(map(math.prod, self.shapes)):
            raise ValueError("low-rank directions are those of whole tensors: no slice has one")
        if source is not None:
            out.copy_(source)
        for k, scale in terms:
            out.view(-1).add_(self.values(k).to(out.device), alpha=scale)

    def values(self, k: int) -> Tensor:
        """z_k in fp32 (d,)."""
        parts = []
        for index, shape in enumerate(self.shapes):
            if len(shape) == 2:
                u = self._normal((shape[0], self.rank), "U", k, index)
                v = self._normal((shape[1], self.rank), "V", k // self.interval, index)
                parts.append((u @ v.T / math.sqrt(self.rank)).reshape(-1))
            else:
                parts.append(self._normal(shape, "z", k, index).reshape(-1))
        return torch.cat(parts)

    def _normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.randn(shape, generator=seeds.generator(self.seed, *purpose))


def check_power_of_two(size: int) -> None:
    """Raises ValueError unless `size` is a number of directions that a sign pool can have."""
    if type(size) is not int or size < 1 or size & (size - 1) or size > signs.MAX_POOL:
        raise ValueError(f"size must be a power of two up to {signs.MAX_POOL}, found {size!r}")


def check_kind(kind: str) -> None:
    """Raises ValueError unless there are directions of this kind in `pool`."""
    if kind not in ("gaussian", "sign"):
        raise ValueError(f"directions must be gaussian or sign, found {kind!r}")


def pool(kind: Literal["gaussian", "sign"], size: int, seed: int) -> GaussianPool | SignPool:
    """The same `size` directions for all rounds of a run."""
    return GaussianPool(seed) if kind == "gaussian" else SignPool(size, (seed, 0))


def by_block(
    out: Tensor, offset: int, source: Tensor | None, change: Callable[[Tensor, int], None]
) -> None:
    """Change `out` block by block in fp32, each value rounded once to the type of `out`."""
    flat = out.view(-1)
    before = flat if source is None else source.reshape(-1)
    start = 0
    while start < len(flat):
        # Cut where the blocks of Gaussian values are cut: none is drawn twice.
        stop = min(len(flat), ((offset + start) // _BLOCK + 1) * _BLOCK - offset)
        values = before[start:stop].to(torch.float32, copy=True)
        change(values, offset + start)
        flat[start:stop] = values.to(flat.dtype)
        start = stop
