"""Shamir's secret sharing over GF(2^8), byte by byte, of secrets of 32 bytes.

Shamir, "How to share a secret", CACM 22 (1979). The field is that of AES: polynomials modulo
x^8 + x^4 + x^3 + x + 1. Products are looked up in a table, so that times depend on secrets: on the
same machine alone (docs/secure-sums.md).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SECRET = 32
"""Bytes of a secret, and of a share."""

MOST = 255
"""Shares there can be at most: the points of the field without 0."""


def _field() -> tuple[Bytes, Bytes]:
    """Returns the table of products (256, 256), and that of inverses (256,); 1/0 is given as 0."""
    power, log, x = [0] * 510, [0] * 256, 1
    for i in range(255):
        power[i] = power[i + 255] = x
        log[x] = i
        x ^= (x << 1) ^ (0x11B if x & 0x80 else 0)
    products = np.zeros((256, 256), np.uint8)
    logs = np.array(log[1:])
    products[1:, 1:] = np.array(power, np.uint8)[logs[:, None] + logs]
    inverses = np.zeros(256, np.uint8)
    inverses[1:] = np.array(power, np.uint8)[255 - logs]
    return products, inverses


_PRODUCTS, _INVERSES = _field()


def split(secret: bytes, threshold: int, shares: int, random: bytes) -> list[bytes]:
    """Returns the shares at the points 1 to `shares`; any `threshold` of them give the secret.

    `random` are the 32 bytes of each coefficient from that of x on: 32 · (threshold - 1).
    """
    if not 1 <= threshold <= shares <= MOST or len(random) != SECRET * (threshold - 1):
        raise ValueError(f"no {shares} shares of threshold {threshold} from {len(random)} bytes")
    coefficients = np.frombuffer(random, np.uint8).reshape(threshold - 1, SECRET)
    points = np.arange(1, shares + 1)[:, None]
    values = np.zeros((shares, SECRET), np.uint8)
    for coefficient in coefficients[::-1]:  # Horner
        values = _PRODUCTS[points, values] ^ coefficient
    values = _PRODUCTS[points, values] ^ np.frombuffer(secret, np.uint8)
    return [share.tobytes() for share in values]


def row(points: Sequence[int]) -> Bytes:
    """Returns Lagrange's coefficients (t,) that take shares at distinct `points` to the secret."""
    found = []
    for i, x in enumerate(points):
        above = below = 1
        for j, other in enumerate(points):
            if j != i:
                above = int(_PRODUCTS[above, other])
                below = int(_PRODUCTS[below, x ^ other])
        found.append(int(_PRODUCTS[above, _INVERSES[below]]))
    return np.array(found, np.uint8)


def combine(coefficients: Bytes, shares: Sequence[Bytes]) -> Bytes:
    """Returns the secrets (k, 32) of `shares`, one array (k, 32) for each coefficient."""
    total = np.zeros_like(shares[0])
    for coefficient, share in zip(coefficients, shares, strict=True):
        total ^= _PRODUCTS[coefficient][share]
    return total
