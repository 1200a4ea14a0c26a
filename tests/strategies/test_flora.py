from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.models import pretrained
from corolla.strategies.flora import Flora
from corolla.tensors import factors, tree
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from corolla.wire import codec
from tests.strategies import tiny

MIXED = {"ranks": [4, 8, 16], "alphas": [8.0, 4.0, 64.0]}


def pair(rank: int, seed: int, out: int = 10, into: int = 8) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.lora_A": torch.randn(rank, into, generator=generator),
        "m.lora_B": torch.randn(out, rank, generator=generator),
    }


def dense(params: Params) -> Tensor:
    return params["m.lora_B"].double() @ params["m.lora_A"].double()


def total(strategy: Flora, state: Payload) -> Tensor:
    return torch.stack([dense(block) for block in strategy.adapter(state).frozen]).sum(0)


def client(outcome: Params, n: int, spec: LoraSpec) -> tiny.Scripted:
    fresh = {**outcome, "m.lora_B": torch.zeros_like(outcome["m.lora_B"])}
    return tiny.Scripted(outcome, n, spec, fresh=fresh)


def test_two_clients_by_hand() -> None:
    """p s = 1/4 · 2 for ada, 3/4 · 1/2 for ben, in A alone."""
    strategy = Flora()
    ada = {"m.lora_A": torch.tensor([[4.0, 8.0]]), "m.lora_B": torch.tensor([[1.0], [-1.0]])}
    ben = {
        "m.lora_A": torch.tensor([[8.0, 0.0], [0.0, 16.0]]),
        "m.lora_B": torch.tensor([[5.0, 0.0], [3.0, 1.0]]),
    }
    clients = [client(ada, 1, LoraSpec(1, 2.0)), client(ben, 3, LoraSpec(2, 1.0))]
    state = tiny.play(strategy, strategy.init({}, 0), clients)
    (block,) = strategy.adapter(state).frozen
    assert block["m.lora_A"].tolist() == [[2.0, 4.0], [3.0, 0.0], [0.0, 6.0]]
    assert block["m.lora_B"].tolist() == [[1.0, 5.0, 0.0], [-1.0, 3.0, 1.0]]


def test_each_round_starts_afresh_beside_all_blocks() -> None:
    strategy = Flora()
    state = strategy.init({}, 0)
    for round in range(1, 4):
        outcome = pair(2, round)
        asked = client(outcome, 1, LoraSpec(2, 2.0))
        state = tiny.play(strategy, state, [asked])
        (call,) = asked.asked
        assert len(call["frozen"]) == round - 1
        assert not call["start"]["m.lora_B"].any()
        assert all(call["train"](name) for name in outcome)
    assert len(strategy.adapter(state).frozen) == 3
    wanted = torch.stack([dense(pair(2, round)) for round in range(1, 4)]).sum(0)
    assert float((total(strategy, state) - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("c", [0.125, 10.0])
def test_alpha_against_b_leaves_the_aggregate(c: float) -> None:
    """(B, alpha) → (B / c, c · alpha) for one client of two."""
    strategy = Flora()

    def aggregate(factor: float) -> Tensor:
        ada = pair(3, 1)
        ada = {**ada, "m.lora_B": ada["m.lora_B"] / factor}
        clients = [
            client(ada, 2, LoraSpec(3, 6.0 * factor)),
            client(pair(5, 2), 5, LoraSpec(5, 4.0)),
        ]
        return total(strategy, tiny.play(strategy, strategy.init({}, 0), clients))

    wanted = aggregate(1.0)
    assert float((aggregate(c) - wanted).norm() / wanted.norm()) < 1e-6


def test_a_head_is_averaged_with_the_clients_weights() -> None:
    strategy = Flora()
    state = strategy.init({"bias": torch.tensor([10.0]), **pair(1, 0)}, 0)
    assert state.keys() == {"head"}
    clients = [
        client({**pair(1, seed), "bias": torch.tensor([value])}, n, LoraSpec(1, 1.0))
        for seed, value, n in ((1, 14.0, 1), (2, 6.0, 3))
    ]
    assert tiny.play(strategy, state, clients)["head"]["bias"].tolist() == [8.0]


# Real rounds


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_mixed_ranks_stay_exact_when_blocks_are_compacted(model: str, tmp_path: Path) -> None:
    """Five rounds, in the third of which the blocks pass twice the full rank."""
    run = tiny.start(tiny.config("flora", **MIXED), model, tmp_path / "memory")
    ranks = []
    for _ in range(5):
        result = run.step()
        ranks.append(result.metrics["frozen_rank"])
        found = tiny.saved(run, tmp_path / "adapter")
        assert tiny.relative(found, run.network.mean()) <= 1e-6
    assert any(later < sooner for sooner, later in pairwise(ranks)), ranks
    assert {run.federation.lora(c).rank for c in tiny.CLIENTS} == {4, 8, 16}


def test_blocks_stay_apart_from_the_base(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("flora", **MIXED), "gpt2", tmp_path)
    before = pretrained.fingerprint(tiny.base("gpt2").model)
    for _ in range(3):
        run.step()
    assert pretrained.fingerprint(run.model.detach()) == before


def test_a_late_joiner_gets_every_block_and_trains_as_if_it_had_been_there(
    tmp_path: Path,
) -> None:
    run = tiny.start(tiny.config("flora", cohort=2, rank=2, rounds=6), "bert", tmp_path / "one")
    met: dict[str, frozenset[str]] = {}
    late = 0
    for round in range(1, 7):
        blocks = frozenset(g for g in run.state if g.startswith("block-"))
        ids = {g: codec.content_id(run.state[g]) for g in blocks}
        known, before = dict(met), run.state
        run.step()
        for name, received in run.network.received.items():
            got = {g for g in received if g.startswith("block-")}
            assert got == {g for g in blocks if ids[g] not in known.get(name, frozenset())}
            late += name not in known and len(blocks) > 1
            met[name] = frozenset(ids.values())
        again = tiny.start(
            tiny.config("flora", cohort=2, rank=2, rounds=6), "bert", tmp_path / str(round)
        )
        again.state, again.done = before, run.done[:-1]  # everybody lacks everything
        again.step()
        assert again.network.sent == run.network.sent
        assert all(
            received.keys() == {"head", *blocks} for received in again.network.received.values()
        )
    assert late
    assert met.keys() == set(tiny.CLIENTS)


def test_first_download_is_the_head_then_the_stack_of_the_cohort(tmp_path: Path) -> None:
    sizes = [Size(A=3, B=5, head=2), Size(A=6, B=10, head=2)]
    assert Flora().cost(sizes) == [Cost(up=40, down=104), Cost(up=72, down=104)]
    run = tiny.start(tiny.config("flora", cohort=4), "llama", tmp_path)
    one = 4 * (2 * 256 + 2 * 192 + 3 * 320)  # see FedAvg: the same factors
    first, second = run.step(), run.step()
    assert (first.traffic.down, first.traffic.up) == (0, 4 * one)
    assert (second.traffic.down, second.traffic.up) == (4 * 4 * one, 4 * one)


# Compaction


def grown(strategy: Flora, rounds: int) -> tuple[list[Payload], list[dict[str, float]], Tensor]:
    """States and metrics of rounds with one client of rank 3, and the dense sum of all."""
    state, states, reports = strategy.init({}, 0), [], []
    exact = torch.zeros(10, 8, dtype=torch.float64)
    for round in range(rounds):
        outcome = pair(3, round)
        exact = exact + dense(outcome)
        aggregator = strategy.aggregator()
        one = client(outcome, 1, LoraSpec(3, 3.0))
        aggregator.add(strategy.local(one, {"head": {}}).payload, 1)
        state, metrics = strategy.apply(state, aggregator.finalise())
        states.append(state)
        reports.append(dict(metrics))
    return states, reports, exact


def test_compaction_at_full_rank_keeps_the_model_and_bounds_the_blocks() -> None:
    strategy = Flora(compact_at=1.0)
    states, reports, exact = grown(strategy, 9)
    found = total(strategy, states[-1])
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    # 3, 6, then 9 > 8 = the full rank: one block of rank 8 again and again
    assert [r["frozen_rank"] for r in reports] == [3.0, 6.0, *[8.0] * 7]


def test_without_compaction_blocks_add_up() -> None:
    states, reports, exact = grown(Flora(compact_at=100.0), 5)
    assert [r["frozen_rank"] for r in reports] == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert [len(state) - 1 for state in states] == [1, 2, 3, 4, 5]
    assert float((total(Flora(), states[-1]) - exact).norm() / exact.norm()) < 1e-6


def test_a_cut_is_the_dense_svd_and_its_error_is_told() -> None:
    strategy = Flora()
    states, _, exact = grown(strategy, 2)
    same, told = strategy.cut(states[1], 6)
    assert tree.digest_all(same) == tree.digest_all(states[1])
    assert told == {"rank_error": 0.0}
    after, told = strategy.cut(states[1], 4)
    u, s, vt = np.linalg.svd(exact.numpy())
    best = torch.from_numpy((u[:, :4] * s[:4]) @ vt[:4])
    assert float((total(strategy, after) - best).norm() / best.norm()) < 1e-6
    tail = float(np.sqrt((s[4:] ** 2).sum() / (s**2).sum()))
    assert tail > 0.05
    assert told == {"frozen_rank": 4, "rank_error": pytest.approx(tail, rel=1e-6)}
    assert strategy.rank_after(2, [Size(24, 30, rank=3)]) == 6


def test_blocks_keep_their_order_and_never_share_a_name() -> None:
    """A compacted block is followed by new ones; none replaces another."""
    strategy = Flora(compact_at=1.5)
    states, _, exact = grown(strategy, 12)
    for state in states:
        assert len({tree.digest(p) for g, p in state.items() if g != "head"}) == len(state) - 1
    assert float((total(strategy, states[-1]) - exact).norm() / exact.norm()) < 2e-6


# Energy


def block_of(strategy: Flora) -> tuple[Params, dict[str, float], Tensor]:
    """The block of one round with three clients, the metrics, and the dense mean."""
    parts = [(pair(rank, rank), n, LoraSpec(rank, 6.0)) for rank, n in ((1, 1), (2, 3), (4, 4))]
    aggregator = strategy.aggregator()
    for outcome, n, spec in parts:
        update = strategy.local(client(outcome, n, spec), {"head": {}})
        aggregator.add(update.payload, n)
    state, metrics = strategy.apply(strategy.init({}, 0), aggregator.finalise())
    terms = [n / 8 * spec.scaling * dense(outcome) for outcome, n, spec in parts]
    (block,) = strategy.adapter(state).frozen
    return block, dict(metrics), torch.stack(terms).sum(0)


def test_all_energy_is_the_stack_bit_for_bit() -> None:
    block, metrics, exact = block_of(Flora(energy=1.0))
    plain, _, _ = block_of(Flora())
    assert tree.digest(block) == tree.digest(plain)
    assert factors.rank(block) == 1 + 2 + 4
    assert "truncation_error" not in metrics
    assert float((dense(block) - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
def test_less_energy_is_the_smallest_rank_that_keeps_it(energy: float) -> None:
    block, metrics, exact = block_of(Flora(energy=energy))
    s = torch.linalg.svdvals(exact)
    kept = (s.square().cumsum(0) / s.square().sum()).tolist()
    rank = next(i for i, share in enumerate(kept, 1) if share >= energy)
    assert factors.rank(block) == metrics["frozen_rank"] == rank
    off = float((dense(block) - exact).norm() / exact.norm())
    assert off <= (1 - energy) ** 0.5
    assert off == pytest.approx((1 - kept[rank - 1]) ** 0.5, abs=1e-6)
    assert metrics["truncation_error"] == pytest.approx(off, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy must be above 0 and at most 1, found 0.0"),
        ({"energy": 1.1}, "energy must be above 0 and at most 1, found 1.1"),
        ({"compact_at": 0.5}, "compact_at must be at least 1, found 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flora(**options)


def test_announces_factors_and_head_apart() -> None:
    like = Flora().update_like({**pair(3, 0), "bias": torch.zeros(2)}, Size(A=24, B=30, head=2))
    assert {group: set(params) for group, params in like.items()} == {
        "factors": {"m.lora_A", "m.lora_B"},
        "head": {"bias"},
    }
    assert factors.rank(like["factors"]) == 3
