"""Frozen low-rank blocks in a server's state: the groups "block-000000", "block-000001", …"""

from corolla.tensors import factors
from corolla.types import Metrics, Params, Payload


def of(payload: Payload) -> Payload:
    """The blocks of a state or a broadcast, oldest first."""
    return {group: payload[group] for group in sorted(payload) if group.startswith("block-")}


def compacted(state: Payload) -> Params | None:
    """The block that the last round made of all, which everybody receives; None: it made another.

    Only a block that others were compacted to has number 0, until the next one is appended.
    """
    blocks = of(state)
    return blocks["block-000000"] if list(blocks) == ["block-000000"] else None


def append(
    state: Payload, block: Params, max_rank: int | None, compact_at: float
) -> tuple[Payload, Metrics]:
    """The blocks of `state` and one more, and what there is to report.

    Once their rank is more than `compact_at` times the largest they are compacted to, all are
    replaced by one of at most `max_rank` (None: the full rank of each module: nothing is lost).
    """
    blocks, error = dict(of(state)), 0.0
    if factors.rank(block):
        blocks[f"block-{_next(blocks):06d}"] = block
    if blocks:
        stacked = factors.stack(list(blocks.values()))
        full = factors.full_rank(stacked)
        if factors.rank(stacked) > compact_at * min(max_rank or full, full):
            compacted, error = factors.compact(stacked, max_rank)
            blocks = {"block-000000": compacted}
    rank = sum(factors.rank(own) for own in blocks.values())
    return blocks, {"frozen_rank": rank, "compaction_error": error}


def check(max_rank: int | None, compact_at: float) -> None:
    """Raises ValueError for options that `append` cannot follow."""
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise ValueError(f"max_rank must be a whole number from 1, found {max_rank}")
    if not compact_at >= 1:
        raise ValueError(f"compact_at must be at least 1, found {compact_at}")


def _next(blocks: Payload) -> int:
    return 1 + max((int(group.removeprefix("block-")) for group in blocks), default=0)
