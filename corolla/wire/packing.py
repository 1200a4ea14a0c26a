"""Values ↔ bytes: the support of top-k, stochastic rounding to a few levels, two codes in a byte.

Support and numbers are flat CPU tensors; `load_support`, `dequantise` and `unpack_codes` read what
came over a network: WireError when it is malformed.
"""

import numpy as np
import torch
from torch import Tensor

from corolla.errors import WireError


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest; what `dtype` does not reach becomes its largest number."""
    if values.dtype == dtype:
        return values
    return values.float().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest magnitudes, ascending; of equal ones the first."""
    size = values.abs()
    threshold = size.topk(k, sorted=False).values.min()
    above = (size > threshold).nonzero().reshape(-1)
    ties = (size == threshold).nonzero().reshape(-1)[: k - len(above)]
    return torch.cat([above, ties]).sort().values


def kept_of_each(support: Tensor, sizes: list[int]) -> list[int]:
    """How many of the indices fall into each tensor."""
    ends = torch.tensor(sizes).cumsum(0)
    upto: list[int] = torch.searchsorted(support, ends).tolist()
    return [after - before for before, after in zip([0, *upto], upto, strict=False)]


def dump_support(support: Tensor, count: int, indexed: bool) -> Tensor:
    """Ascending indices below `count` as int32, or as a bitmap of ⌈count / 8⌉ bytes."""
    if indexed:
        return support.to(torch.int32)
    mask = np.zeros(count, dtype=np.bool_)
    mask[support.numpy()] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


def load_support(data: Tensor, count: int, kept: int, indexed: bool) -> Tensor:
    """`kept` ascending indices below `count`, int64. Raises WireError when they are not."""
    if indexed:
        indices = data.clone().view(torch.int32).long()
    else:
        indices = torch.from_numpy(np.unpackbits(data.numpy(), bitorder="little").nonzero()[0])
    if (
        len(indices) != kept
        or not bool((indices.diff() > 0).all())
        or not 0 <= int(indices[0]) <= int(indices[-1]) < count
    ):
        raise WireError(f"support is not {kept} ascending indices below {count}")
    return indices


def quantise(
    values: Tensor, sizes: list[int], levels: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(peaks as fp32, codes + levels + 1 as uint8): codes are -levels … levels."""
    peaks, codes = torch.zeros(len(sizes)), torch.empty(len(values), dtype=torch.uint8)
    pieces = zip(torch.split(values, sizes), torch.split(codes, sizes), strict=True)
    for i, (piece, out) in enumerate(pieces):
        peak = float(piece.abs().max()) if len(piece) else 0.0
        noise = torch.rand(len(piece), generator=rng, dtype=torch.float64)
        # The ratio first: peak / levels may underflow.
        code = (piece.double() / (peak or 1.0) * levels + noise).floor().clamp(-levels, levels)
        peaks[i] = peak
        out.copy_(code + levels + 1)
    return peaks, codes


def dequantise(codes: Tensor, peaks: Tensor, sizes: list[int], levels: int) -> Tensor:
    """The values code · peak / levels in fp64, rounded to fp32."""
    if not bool((torch.isfinite(peaks) & (peaks >= 0)).all()):
        raise WireError("peaks are not finite numbers from 0")
    if not bool(((codes > 0) & (codes <= 2 * levels + 1)).all()):
        raise WireError(f"codes are not between -{levels} and {levels}")
    out = torch.empty(len(codes))
    for piece, code, peak in zip(
        torch.split(out, sizes), torch.split(codes, sizes), peaks, strict=True
    ):
        piece.copy_((code.double() - (levels + 1)) * float(peak) / levels)
    return out


def pack_codes(codes: Tensor) -> Tensor:
    """Two codes below 16 in a byte, the first in the low bits; a last odd one beside 0."""
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpack_codes(data: Tensor, count: int) -> Tensor:
    """The codes of `pack_codes`. Raises WireError when there are more."""
    codes = torch.stack([data & 15, data >> 4], dim=1).reshape(-1)
    if bool(codes[count:].any()):
        raise WireError("there are codes after the last")
    return codes[:count]
