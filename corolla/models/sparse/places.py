"""The places of a sparse set: which values of each weight matrix are trained.

As many of a module as LoRA of a rank has: rank · (out + in), the count of SHiRA (Bhardwaj et al.,
"Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175). Places are counted in the flattened
weight as the model stores it. They are chosen once, in one process, and travel as they are: scores
are not the same bits on every machine. Random ones are integer hashes, which are.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from corolla import seeds
from corolla.errors import ModelError, WireError
from corolla.types import Params
from corolla.wire import packing
from corolla.wire.supports import Part

Places = Mapping[str, Tensor]
"""Module → its places (k,), int64, ascending."""

_U64 = np.uint64


def count(name: str, shape: tuple[int, ...], rank: int) -> int:
    """Computes how many values of a module are trained.

    Raises ModelError for a rank at which these are more than the module has.
    """
    k = rank * sum(shape)
    if k > math.prod(shape):
        most = math.prod(shape) // sum(shape)
        raise ModelError(
            f"rank {rank} asks for {k} values of module {name}, which has {math.prod(shape)}: at "
            f"most rank {most}, or choose other target_modules"
        )
    return k


def top(scores: Tensor, k: int) -> Tensor:
    """The places (k,) of the largest of some scores, ascending; of equal scores the first ones.

    Raises ModelError for scores that are not finite.
    """
    flat = scores.flatten()
    if not bool(torch.isfinite(flat).all()):
        raise ModelError("scores of a sparse set are not finite: use dtype=float32, and other rows")
    return packing.largest(flat, k)


def random(sizes: Mapping[str, int], counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random places of modules (name → values that it has), the same on every machine.

    A place's score is a hash of the seed, the module's name and the place: that of SplitMix64
    (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Those of
    a module do not depend on which others there are.
    """
    found = {}
    for name, size in sizes.items():
        own = _U64(seeds.derive(seed, "places", name, 0) << 32 | seeds.derive(seed, "places", name))
        scores = _mixed(own + np.arange(1, size + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15))
        found[name] = top(torch.from_numpy((scores >> _U64(1)).astype(np.int64)), counts[name])
    return found


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> _U64(27))) * _U64(0x94D049BB133111EB)
    return state ^ (state >> _U64(31))


def packed(places: Places, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Places as they travel: 4 bytes each, or a bit for each value of a module if that is less."""
    return {
        name: packing.dump_support(at, sizes[name], Part(sizes[name], len(at)).indexed)
        for name, at in places.items()
    }


def blank(sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Packed places of no meaning, of the size that all have."""
    return packed({name: torch.arange(counts[name]) for name in sizes}, sizes)


def opened(given: Params, sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Places of what `packed` has made of them.

    Raises WireError where these are not `counts` places in ascending order of these modules.
    """
    if given.keys() != sizes.keys():
        odd = sorted(given.keys() ^ sizes.keys())
        raise WireError(f"places differ from the model in {len(odd)} modules, first {odd[0]}")
    found = {}
    for name, tensor in given.items():
        part = Part(sizes[name], counts[name])
        kind, length = (torch.int32, part.kept) if part.indexed else (torch.uint8, part.support)
        if tensor.dtype != kind or tensor.shape != (length,):
            raise WireError(
                f"places of {name} are {tuple(tensor.shape)} of {tensor.dtype}: expected "
                f"({length},) of {kind}"
            )
        found[name] = packing.load_support(tensor, part.count, part.kept, part.indexed)
    return found
