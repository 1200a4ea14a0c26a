"""Rounds with `max_rank` beside everything else: the state is numpy's truncated SVD of the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corolla.config.build import build_strategy
from corolla.config.load import load
from corolla.errors import ConfigError
from corolla.tensors import tree
from corolla.types import Params, Payload
from tests.strategies import tiny

RANK = 5
FLORA: dict[str, Any] = {"strategy": "flora"}
FEDEX: dict[str, Any] = {"strategy": "fedex_lora"}
CASES: dict[str, dict[str, Any]] = {
    "flora": FLORA,
    "flora, mixed ranks": {**FLORA, "ranks": [2, 4], "alphas": [2.0, 16.0]},
    "flora, energy": {**FLORA, "options": {"energy": 0.9}},
    "flora, codecs": {**FLORA, "codec": ["int8", "zstd"], "codec_down": ["fp16"]},
    "flora, codec rank": {**FLORA, "codec": ["rank:2"]},
    "flora, norm_clip": {**FLORA, "robust": "norm_clip"},
    "flora, dp=example": {**FLORA, "dp": "example", "epsilon": 8.0},
    "fedex_lora": FEDEX,
    "fedex_lora, stabilised": {**FEDEX, "rslora": True},
    "fedex_lora, one residual": {**FEDEX, "options": {"residual_rank": 2}},
    "fedex_lora, codecs": {**FEDEX, "codec": ["int4"], "codec_down": ["bf16", "zstd"]},
    "fedex_lora, dp=example": {**FEDEX, "dp": "example", "epsilon": 8.0},
    "fedex_lora, sgd": {**FEDEX, "optimizer": "sgd", "lr": 0.3},
}


def dense(run: tiny.Run, state: Payload) -> Params:
    """The effective update of each module, as peft has it."""
    run.model.show(run.federation.strategy.adapter(state), run.federation.config.lora)
    return {n: t for n, t in run.model.deltas().items() if not n.startswith("classifier")}


@pytest.mark.parametrize("case", CASES)
def test_a_round_ends_in_the_best_state_of_the_rank(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.start(tiny.config(**CASES[case], max_rank=RANK), "bert", tmp_path)
    states: list[Payload] = []
    cls: Any = type(run.federation.strategy)
    apply = cls.apply

    def applied(*given: Any) -> Any:
        state, metrics = apply(*given)
        states.append(state)
        return state, metrics

    monkeypatch.setattr(cls, "apply", applied)
    for number in (1, 2):
        found = run.step()
        reached, lost, total = dense(run, found.state), 0.0, 0.0
        assert len(states) == number
        for name, update in dense(run, states[-1]).items():
            u, s, vt = np.linalg.svd(update.numpy(), full_matrices=False)
            best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
            assert np.linalg.norm(reached[name].numpy() - best) < 1e-5 * np.linalg.norm(s), name
            lost, total = lost + float((s[RANK:] ** 2).sum()), total + float((s**2).sum())
        assert found.metrics["rank_error"] == pytest.approx((lost / total) ** 0.5, abs=1e-6)
        assert 0 < found.metrics["rank_error"] < 1


@pytest.mark.parametrize("case", ["flora", "fedex_lora"])
def test_the_order_of_answers_changes_no_bit(case: str, tmp_path: Path) -> None:
    runs = [
        tiny.start(tiny.config(**CASES[case], max_rank=RANK), "llama", tmp_path / f"{backwards}",
                   reverse=backwards)
        for backwards in (False, True)
    ]  # fmt: skip
    one, other = ([run.step().state for _ in range(2)] for run in runs)
    assert [tree.digest_all(state) for state in one] == [tree.digest_all(own) for own in other]


def test_a_rank_that_is_never_reached_changes_no_bit(tmp_path: Path) -> None:
    """A round of three clients of rank 4 stacks 12."""
    runs = [
        tiny.start(tiny.config("flora", max_rank=most), "llama", tmp_path / f"{most}")
        for most in (None, 12)
    ]
    one, other = (run.step() for run in runs)
    assert tree.digest_all(one.state) == tree.digest_all(other.state)
    assert other.metrics["rank_error"] == 0.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("max_rank=0", "max-rank: expected a whole number from 1 to"),
        ("max_rank=-1", "max-rank: expected a whole number from 1 to"),
        ("max_rank=x", "max-rank: expected a whole number from 1 to"),
        ("max_rank=2.5", "max-rank: expected a whole number from 1 to"),
        (
            "strategy=fedex_lora rank=8 max_rank=7",
            "clients of strategy fedex_lora go on with an adapter of rank 8, which is more than "
            "max-rank=7: raise max-rank, or lower rank",
        ),
        ("strategy=flora max_rank=4 dp=client epsilon=8", "dp=client does not fit strategy flora"),
        ("strategy=flora max_rank=4 parameters=bias", "strategy flora trains LoRA factors"),
        ("strategy=flora strategy.max_rank=4", "strategy flora has no option 'max_rank'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_strategy(load(None, {}, settings.split()))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
