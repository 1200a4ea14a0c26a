"""Frozen low-rank blocks in a server's state: the groups "block-000000", "block-000001", …"""

from corolla.tensors import factors
from corolla.types import Metrics, Params, Payload

COMPACTED = "block-000000"
"""The group of a block that takes the place of all others."""


def of(payload: Payload) -> Payload:
    """The blocks of a state or a broadcast, oldest first."""
    return {group: payload[group] for group in sorted(payload) if group.startswith("block-")}


def compacted(state: Payload) -> Params | None:
    """The block that the last round made of all, which everybody receives; None: it made another.

    Only a block that others were compacted to has number 0, until the next one is appended.
    """
    blocks = of(state)
    return blocks[COMPACTED] if list(blocks) == [COMPACTED] else None


def append(state: Payload, block: Params, compact_at: float) -> tuple[Payload, Metrics]:
    """The blocks of `state` and one more, and what there is to report.

    Once their rank is more than `compact_at` times the full rank of the modules, all are replaced
    by one of that rank, which loses nothing.
    """
    blocks = dict(of(state))
    if factors.rank(block):
        blocks[f"block-{_next(blocks):06d}"] = block
    if blocks:
        stacked = factors.stack(list(blocks.values()))
        if factors.rank(stacked) > compact_at * factors.full_rank(stacked):
            compacted, _ = factors.compact(stacked)
            blocks = {COMPACTED: compacted}
    return blocks, {"frozen_rank": rank(blocks)}


def cut(state: Payload, most: int, beside: Params | None = None) -> tuple[Params, Payload, Metrics]:
    """(factors `beside` the blocks, blocks, report) of the best sum of all, of rank at most `most`.

    The factors beside them, at the same scaling, keep their rank and get the directions of the
    largest singular values. The rows of their A keep their mean length, on which the next steps of
    B depend, and B takes the rest. Nothing changes where the rank is no larger.
    """
    parts = [*([beside] if beside else []), *of(state).values()]
    stacked = factors.stack(parts or [{}])
    if factors.rank(stacked) <= most:
        return beside or {}, of(state), {"rank_error": 0.0}
    lengths = factors.lengths(beside) if beside else None
    best, error = factors.compact(stacked, most, lengths=lengths)
    first, rest = factors.split(best, factors.rank(beside or {}))
    blocks = {COMPACTED: rest} if factors.rank(rest) else {}
    return first, blocks, {"frozen_rank": rank(blocks), "rank_error": error}


def rank(state: Payload) -> int:
    """The rank of all blocks of a state side by side; 0 without any."""
    return sum(factors.rank(block) for block in of(state).values())


def check(compact_at: float) -> None:
    """Raises ValueError for an option that `append` cannot follow."""
    if not compact_at >= 1:
        raise ValueError(f"compact_at must be at least 1, found {compact_at}")


def _next(blocks: Payload) -> int:
    return 1 + max((int(group.removeprefix("block-")) for group in blocks), default=0)
