from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.tensors import blocks, factors
from corolla.types import Params, Payload
from tests.strategies import tiny


def total(payload: Payload) -> Tensor:
    """The sum of the blocks' products, dense."""
    return torch.stack([tiny.dense(block) for block in blocks.of(payload).values()]).sum(0)


def grown(ranks: list[int], compact_at: float) -> tuple[Payload, Any, Tensor]:
    """Blocks after one of each rank, the last report, and the dense sum."""
    state: Payload = {"head": {}}
    exact = torch.zeros(10, 8, dtype=torch.float64)
    for seed, rank in enumerate(ranks):
        block = tiny.pair(rank, seed)
        exact = exact + tiny.dense(block)
        state, metrics = blocks.append(state, block, compact_at)
    return state, metrics, exact


def test_blocks_are_the_groups_of_that_name_oldest_first() -> None:
    one: Params = tiny.pair(1, 0)
    payload = {"block-000010": one, "head": {}, "block-000002": one, "adapter": one}
    assert list(blocks.of(payload)) == ["block-000002", "block-000010"]


def test_a_new_block_comes_last_and_the_others_stay_as_they_are() -> None:
    """Unchanged content has the same content id, and is not sent again."""
    state, metrics, exact = grown([2, 3], 2.0)
    assert list(state) == ["block-000001", "block-000002"]
    assert tiny.same(state["block-000001"], tiny.pair(2, 0))
    assert tiny.same(state["block-000002"], tiny.pair(3, 1))
    assert metrics == {"frozen_rank": 5}
    assert torch.equal(total(state), exact)


def test_a_block_without_rank_is_none() -> None:
    empty = {"m.lora_A": torch.zeros(0, 8), "m.lora_B": torch.zeros(10, 0)}
    assert blocks.append({}, empty, 2.0) == ({}, {"frozen_rank": 0})


def test_compaction_begins_beyond_the_limit_and_loses_nothing_at_full_rank() -> None:
    """The full rank is 8: 16 stay as they are, 17 become one block of 8."""
    at, metrics, _ = grown([8, 8], 2.0)
    assert (len(at), metrics["frozen_rank"]) == (2, 16)
    beyond, metrics, exact = grown([8, 8, 1], 2.0)
    assert (list(beyond), metrics["frozen_rank"]) == (["block-000000"], 8)
    assert float((total(beyond) - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("often", [0.9, float("nan")])
def test_an_option_that_makes_no_sense_is_refused(often: float) -> None:
    with pytest.raises(ValueError, match=f"compact_at must be at least 1, found {often}"):
        blocks.check(often)


def test_a_module_that_nobody_trained_stays_without_rank_when_others_are_cut() -> None:
    none = {"none.lora_A": torch.zeros(0, 8), "none.lora_B": torch.zeros(10, 0)}
    state: Payload = {"block-000001": {**tiny.pair(5, 0), **none}}
    beside, found, metrics = blocks.cut(state, 3)
    assert beside == {} or factors.rank(beside) == 0
    (block,) = found.values()
    assert [block[f"{m}.lora_A"].shape[0] for m in ("m", "none")] == [3, 0]
    s = np.linalg.svd(tiny.dense(tiny.pair(5, 0)).numpy(), compute_uv=False)
    tail = float(np.sqrt((s[3:] ** 2).sum() / (s**2).sum()))
    assert metrics == {"frozen_rank": 3, "rank_error": pytest.approx(tail, rel=1e-6)}
