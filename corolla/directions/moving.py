"""Moves along directions of a pool: applied, settled into tensors, and told apart."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corolla.directions import signs
from corolla.directions.pools import SignPool, by_block
from corolla.tensors import tree
from corolla.types import Move, Params


def apply(out: Tensor, offset: int, moves: Sequence[Move], source: Tensor | None = None) -> None:
    """`out` = `source` (default: itself) + all moves, for values offset … of the flat vector.

    Runs in fp32 and rounds once to the type of `out`, so that who applies moves one by one to
    fp32 weights, and who applies all at the end, have the same bits.
    """
    prepared(moves)(out, offset, source)


def prepared(moves: Sequence[Move]) -> Callable[[Tensor, int, Tensor | None], None]:
    """`apply` for these moves, to be called for many tensors: transforms are computed once."""
    spectra = [_spectrum(move) if isinstance(move.pool, SignPool) else None for move in moves]
    logs = [
        (move.pool.key, spectrum)
        for move, spectrum in zip(moves, spectra, strict=True)
        if isinstance(move.pool, SignPool) and spectrum is not None
    ]
    if len(logs) == len(moves):
        return lambda out, offset, source: signs.replay(out, offset, logs, source)

    def each(values: Tensor, at: int) -> None:
        for move, spectrum in zip(moves, spectra, strict=True):
            _apply_one(values, at, move, spectrum)

    return lambda out, offset, source: by_block(out, offset, source, each)


def fingerprint(moves: Sequence[Move]) -> str:
    """sha256 (hex) of what moves do."""
    sha = hashlib.sha256()
    for move in moves:
        sha.update(f"{move.pool!r}|{move.step!r}|{move.scalars.dtype}|".encode())
        sha.update(move.scalars.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def settle(start: Params, moves: Sequence[Move]) -> Params:
    """The tensors of `start` after all moves; new tensors."""
    flat, layout = flatten(start)
    apply(flat, 0, moves)
    return unflatten(flat, layout)


class Settled:
    """`settle` that keeps its last result: all clients of a round start after the same moves."""

    def __init__(self) -> None:
        self._key = ""
        self._last: Params = {}

    def __call__(self, start: Params, moves: Sequence[Move]) -> Params:
        if not moves:
            return start
        key = tree.digest(start) + fingerprint(moves)
        if key != self._key:
            self._key, self._last = key, settle(start, moves)
        return self._last


def flatten(params: Params) -> tuple[Tensor, list[tuple[str, torch.Size]]]:
    """(all tensors sorted by name as one new fp32 vector, their names and shapes)."""
    names = sorted(params)
    layout = [(name, params[name].shape) for name in names]
    flat = torch.cat([params[name].detach().float().cpu().reshape(-1) for name in names])
    return flat, layout


def unflatten(flat: Tensor, layout: Sequence[tuple[str, torch.Size]]) -> Params:
    """Views of a flat vector, by name."""
    found: dict[str, Tensor] = {}
    at = 0
    for name, shape in layout:
        found[name] = flat[at : at + shape.numel()].view(shape)
        at += shape.numel()
    return found


def _apply_one(values: Tensor, at: int, move: Move, spectrum: NDArray[np.float32] | None) -> None:
    if isinstance(move.pool, SignPool) and spectrum is not None:
        signs.replay(values, at, [(move.pool.key, spectrum)])
        return
    scales = move.step * move.scalars.double()
    used = torch.nonzero(scales).reshape(-1).tolist()
    # Summed before it meets the weights, which are larger: less is lost.
    total = torch.zeros_like(values)
    move.pool.add(total, at, [(k, float(scales[k])) for k in used])
    values += total


def _spectrum(move: Move) -> NDArray[np.float32]:
    """Step · FWHT(scalars), computed in fp64 and rounded once: (size,) fp32."""
    scalars = move.scalars.double().cpu().numpy()
    return (move.step * signs.fwht(scalars)).astype(np.float32)
