"""Derived seeds: one run seed, and a separate stream for every use of randomness.

Nothing in Corolla draws from a global random state. Each use has its own generator whose seed is
a hash of the run seed and of what it is for, so that no draw depends on how many came before.
"""

import hashlib
import json

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**32) for one purpose, e.g. `derive(run_seed, "order", round, client)`.

    32 bits because torch's CPU generator ignores the higher ones.
    """
    text = json.dumps([seed, *purpose], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose; see `derive`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
