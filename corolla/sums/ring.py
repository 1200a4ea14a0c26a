"""Masks of vectors of 32-bit integers: a stream of AES-256-CTR that is added modulo 2^32."""

import sys
from collections.abc import Iterable
from itertools import islice

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Vector = NDArray[np.uint32]
"""Integers modulo 2^32; those from 2^31 on stand for negative ones."""

Mask = tuple[bytes, int]
"""A key of 32 bytes, and 1 where its stream is added, -1 where it is subtracted."""

_PIECE = 1 << 18
"""Values that are masked at a time: 1 MiB, which stays in the cache beside the stream."""

_STREAMS = 256
"""Streams that are open at a time: each takes about a kilobyte."""

_ZEROS = bytes(4 * _PIECE)


def add_masks(vector: Vector, masks: Iterable[Mask]) -> None:
    """Add ±PRG(key) of every mask to a contiguous `vector` (n,), in place.

    PRG(key) is AES-256-CTR with an initial counter of 0, over zeros, read as little-endian
    integers of 32 bits. The order of masks does not matter.
    """
    buffer = bytearray(4 * min(_PIECE, len(vector)) + 16)
    waiting = iter(masks)
    while streams := [(_stream(key), sign) for key, sign in islice(waiting, _STREAMS)]:
        for start in range(0, len(vector), _PIECE):
            piece = vector[start : start + _PIECE]
            for stream, sign in streams:
                _add(piece, stream, sign, buffer)


def add(total: Vector, other: Vector) -> None:
    """Add one vector to another of its length in place, modulo 2^32."""
    np.add(total, other, out=total)


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def _add(piece: Vector, stream: CipherContext, sign: int, buffer: bytearray) -> None:
    stream.update_into(memoryview(_ZEROS)[: 4 * len(piece)], buffer)
    words = np.frombuffer(buffer, "<u4", len(piece))
    if sys.byteorder == "big":
        words = words.astype(np.uint32)
    (np.add if sign > 0 else np.subtract)(piece, words, out=piece)
