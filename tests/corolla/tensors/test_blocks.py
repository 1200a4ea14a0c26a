from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.tensors import blocks
from corolla.types import Params, Payload
from tests.strategies import tiny


def total(payload: Payload) -> Tensor:
    """The sum of the blocks' products, dense."""
    return torch.stack([tiny.dense(block) for block in blocks.of(payload).values()]).sum(0)


def grown(ranks: list[int], max_rank: int | None, compact_at: float) -> tuple[Payload, Any, Tensor]:
    """Blocks after one of each rank, the last report, and the dense sum."""
    state: Payload = {"head": {}}
    exact = torch.zeros(10, 8, dtype=torch.float64)
    for seed, rank in enumerate(ranks):
        block = tiny.pair(rank, seed)
        exact = exact + tiny.dense(block)
        state, metrics = blocks.append(state, block, max_rank, compact_at)
    return state, metrics, exact


def test_blocks_are_the_groups_of_that_name_oldest_first() -> None:
    one: Params = tiny.pair(1, 0)
    payload = {"block-000010": one, "head": {}, "block-000002": one, "adapter": one}
    assert list(blocks.of(payload)) == ["block-000002", "block-000010"]


def test_a_new_block_comes_last_and_the_others_stay_as_they_are() -> None:
    """Unchanged content has the same content id, and is not sent again."""
    state, metrics, exact = grown([2, 3], None, 2.0)
    assert list(state) == ["block-000001", "block-000002"]
    assert tiny.same(state["block-000001"], tiny.pair(2, 0))
    assert tiny.same(state["block-000002"], tiny.pair(3, 1))
    assert metrics == {"frozen_rank": 5, "compaction_error": 0.0}
    assert torch.equal(total(state), exact)


def test_a_block_without_rank_is_none() -> None:
    empty = {"m.lora_A": torch.zeros(0, 8), "m.lora_B": torch.zeros(10, 0)}
    assert blocks.append({}, empty, None, 2.0) == (
        {},
        {"frozen_rank": 0, "compaction_error": 0.0},
    )


def test_compaction_begins_beyond_the_limit_and_loses_nothing_at_full_rank() -> None:
    """The full rank is 8: 16 stay as they are, 17 become one block of 8."""
    at, metrics, _ = grown([8, 8], None, 2.0)
    assert (len(at), metrics["frozen_rank"]) == (2, 16)
    beyond, metrics, exact = grown([8, 8, 1], None, 2.0)
    assert (list(beyond), metrics["frozen_rank"]) == (["block-000000"], 8)
    assert metrics["compaction_error"] == 0.0
    assert float((total(beyond) - exact).norm() / exact.norm()) < 1e-6


def test_compaction_to_a_smaller_rank_is_the_dense_svd_and_says_its_error() -> None:
    state, metrics, exact = grown([2, 3], 4, 1.0)
    s = torch.linalg.svdvals(exact)
    tail = float((s[4:].square().sum() / s.square().sum()).sqrt())
    assert metrics == {"frozen_rank": 4, "compaction_error": pytest.approx(tail, rel=1e-6)}
    found = float((total(state) - exact).norm() / exact.norm())
    assert found == pytest.approx(tail, rel=1e-5)


@pytest.mark.parametrize(
    ("max_rank", "compact_at", "message"),
    [
        (0, 2.0, "max_rank must be a whole number from 1, found 0"),
        (2.0, 2.0, "max_rank must be a whole number from 1, found 2.0"),
        (True, 2.0, "max_rank must be a whole number from 1, found True"),
        (None, 0.9, "compact_at must be at least 1, found 0.9"),
        (None, float("nan"), "compact_at must be at least 1, found nan"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    max_rank: Any, compact_at: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        blocks.check(max_rank, compact_at)
