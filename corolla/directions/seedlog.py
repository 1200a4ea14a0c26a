"""Seed logs: a model as a start and a row of scalars for each round.

A version names a state by everything that led to it: the base model, the first state, all rows in
order. Who holds one version and receives the rows after it reaches the next one, and a gap, a
foreign row or another base model cannot go unnoticed.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from corolla import seeds
from corolla.directions import signs
from corolla.directions.moving import settle
from corolla.directions.pools import SignPool
from corolla.tensors import tree
from corolla.types import Broadcast, Move, Params, Payload, Size, Walk

LAST = "last"
"""The group that tells a client the number of the last row."""

_LARGEST = 13
"""Rows in half precision are scaled so that their largest scalar is in [2**13, 2**14)."""


def origin(base: str, first: Payload) -> str:
    """The version before any row: of a base model (its sha256) and the first state. 32 hex."""
    return _hash(base, tree.digest_all(first))


def after(version: str, row: Params) -> str:
    """The version that a row leads to. 32 hexadecimal characters."""
    return _hash(version, tree.digest(row))


def versions(start: str, rows: Sequence[Params]) -> list[str]:
    """`start` and the version after each row."""
    found = [start]
    for row in rows:
        found.append(after(found[-1], row))
    return found


def rows(payload: Payload) -> Mapping[int, Params]:
    """The rows in a state or a broadcast, by number, in order."""
    found = {int(g.removeprefix("log-")): payload[g] for g in payload if g.startswith("log-")}
    return dict(sorted(found.items()))


def first_state(start: Params, seed: int) -> Payload:
    """A start without rows, and the seed that the signs of all rows follow from."""
    return {"start": start, "key": {"seed": torch.tensor(seeds.derive(seed, "directions"))}}


def broadcast(state: Payload, size: int) -> Broadcast:
    """All rows; for an adapter also the weights, where these are fewer bytes."""
    found = list(rows(state).values())
    if not state["start"]:
        return Broadcast({}, log=found)
    return Broadcast({}, log=found, snapshot=lambda: settle(state["start"], moves(state, size)))


def next_number(payload: Payload) -> int:
    """The number of the row that comes after those of a state or a broadcast."""
    if LAST in payload:  # with a snapshot there may be no row to count from
        return int(payload[LAST]["number"]) + 1
    return max(rows(payload), default=0) + 1


def pool(payload: Payload, size: int, number: int) -> SignPool:
    """The directions of a row: signs that are new in each, from the seed in the group "key"."""
    return SignPool(size, (int(payload["key"]["seed"]), number))


def moves(payload: Payload, size: int) -> tuple[Move, ...]:
    """Returns the moves that the rows of a state or a broadcast make, in order."""
    return tuple(
        Move(pool(payload, size, number), row["scalars"], float(row["step"]))
        for number, row in rows(payload).items()
    )


def row(sums: Tensor, dtype: torch.dtype) -> Params:
    """A row that moves by Σ_k sums[k] z_k: scalars in `dtype` (K,), and a step they are times.

    In half precision the step is a power of two that leaves neither zeros nor infinities: only
    the last of 11 bits is lost.
    """
    step = 1.0
    largest = float(sums.abs().max())
    if dtype == torch.float16 and 0 < largest < math.inf:
        step = 2.0 ** (math.frexp(largest)[1] - 1 - _LARGEST)
        step = max(step, 2.0**-126)
    return {"scalars": (sums / step).to(dtype), "step": torch.tensor(step, dtype=torch.float32)}


def directions(scalars: Params, size: int) -> Tensor:
    """Which direction each scalar of an update belongs to: int64 (T,)."""
    if "directions" in scalars:
        return scalars["directions"].long()
    count = len(scalars["scalars"])
    return torch.from_numpy(signs.choices(int(scalars["seed"]), count, size))


def upload(walk: Walk, **named: Tensor) -> Params:
    """The scalar group of what a client measured: its scalars, its step, and what is named."""
    step = torch.tensor(walk.step, dtype=torch.float32)
    return {"scalars": walk.scalars, "step": step, **named}


def upload_like(size: Size, dtype: torch.dtype, pool_size: int | None = None) -> Params:
    """Returns the form of `upload`: with a seed, or with directions of a pool of `pool_size`."""
    like = {
        "scalars": torch.zeros(size.scalars, dtype=dtype),
        "step": torch.tensor(size.step, dtype=torch.float32),
    }
    if pool_size is None:
        return {**like, "seed": torch.tensor(size.seed)}
    return {**like, "directions": torch.full((size.scalars,), pool_size - 1, dtype=torch.int32)}


def _hash(*parts: str) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()
