from pathlib import Path

import pytest
import torch
from torch import Tensor

from corolla.strategies.flexlora import FlexLora
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from corolla.wire import messages
from tests.strategies import tiny

SPECS = [LoraSpec(2, 4.0), LoraSpec(3, 12.0), LoraSpec(6, 3.0)]
EXAMPLES = [1, 3, 4]


def cohort() -> list[tiny.Scripted]:
    """Three clients of rank 2, 3 and 6."""
    return [
        tiny.Scripted(tiny.pair(spec.rank, seed, 14, 12), n, spec)
        for seed, (spec, n) in enumerate(zip(SPECS, EXAMPLES, strict=True), 1)
    ]


def exact() -> Tensor:
    """Σ p_m s_m B_m A_m, dense."""
    terms = [c.num_examples / 8 * c.lora.scaling * tiny.dense(c.outcome) for c in cohort()]
    return torch.stack(terms).sum(0)


def state_of(strategy: FlexLora, rank: int) -> Payload:
    """After one round with a global adapter of that rank."""
    return tiny.play(strategy, strategy.init(tiny.pair(rank, 0, 14, 12), 0), cohort())


def start_of(strategy: FlexLora, state: Payload, lora: LoraSpec) -> Params:
    """What a client of this rank and scaling receives."""
    fitted = strategy.broadcast(state).fitted
    assert fitted is not None
    return fitted(lora)["adapter"]


def best(dense: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(dense)
    truncated: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return truncated


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_two_clients_by_hand() -> None:
    """1/4 · 2 · 8 e₁e₁ᵀ and 3/4 · 4 e₂e₂ᵀ: S = (4, 3); a client of rank 1 gets 4 e₁e₁ᵀ."""
    ada = {"m.lora_A": torch.tensor([[8.0, 0.0]]), "m.lora_B": torch.tensor([[1.0], [0.0]])}
    ben = {"m.lora_A": torch.tensor([[0.0, 0.0], [0.0, 4.0]]), "m.lora_B": torch.eye(2)}
    clients = [tiny.Scripted(ada, 1, LoraSpec(1, 2.0)), tiny.Scripted(ben, 3, LoraSpec(2, 2.0))]
    strategy = FlexLora()
    start = {"m.lora_A": torch.ones(2, 2), "m.lora_B": torch.zeros(2, 2)}
    state = tiny.play(strategy, strategy.init(start, 0), clients)
    (block,) = strategy.adapter(state).frozen
    assert torch.allclose(tiny.dense(block), torch.diag(torch.tensor([4.0, 3.0]).double()))
    own = start_of(strategy, state, LoraSpec(1, 2.0))
    assert own["m.lora_A"].abs().tolist() == [[1.0, 0.0]]
    assert own["m.lora_B"].abs().tolist() == [[2.0], [0.0]]  # U S / s
    assert tiny.dense(own).tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_at_full_rank_the_mean_is_kept_exactly() -> None:
    """Ranks 2 + 3 + 6 = 11 of at most 12."""
    strategy = FlexLora()
    (block,) = strategy.adapter(state_of(strategy, 11)).frozen
    assert gap(tiny.dense(block), exact()) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_smaller_global_rank_is_the_dense_svd_with_the_tail_as_its_error(rank: int) -> None:
    strategy, aggregator = FlexLora(), FlexLora().aggregator()
    state = strategy.init(tiny.pair(rank, 0, 14, 12), 0)
    members = cohort()
    for member in members:
        update = strategy.local(member, {"adapter": member.outcome, "head": {}})
        aggregator.add(update.payload, member.num_examples)
    after, metrics = strategy.apply(state, aggregator.finalise())
    (block,) = strategy.adapter(after).frozen
    assert block["m.lora_A"].shape == (rank, 12)
    assert gap(tiny.dense(block), best(exact(), rank)) < 1e-5
    s = torch.linalg.svdvals(exact())
    tail = float((s[rank:].square().sum() / s.square().sum()).sqrt())
    assert metrics["truncation_error"] == pytest.approx(tail, rel=1e-5)
    assert gap(tiny.dense(block), exact()) == pytest.approx(tail, rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("lora", SPECS)
def test_each_client_starts_from_its_best_approximation(lora: LoraSpec, balanced: bool) -> None:
    strategy = FlexLora(balanced)
    own = start_of(strategy, state_of(strategy, 6), lora)
    assert gap(lora.scaling * tiny.dense(own), best(exact(), lora.rank)) < 1e-5


@pytest.mark.parametrize("lora", SPECS)
def test_how_the_singular_values_are_split(lora: LoraSpec) -> None:
    """All in B, and A orthonormal; or √S / √s in both."""
    s = torch.linalg.svdvals(exact())[: lora.rank].float()
    whole = start_of(FlexLora(), state_of(FlexLora(), 6), lora)
    a, b = whole["m.lora_A"], whole["m.lora_B"]
    assert torch.allclose(a @ a.T, torch.eye(lora.rank), atol=1e-5)
    assert torch.allclose(b.norm(dim=0), s / lora.scaling, rtol=1e-5)
    split = start_of(FlexLora(True), state_of(FlexLora(True), 6), lora)
    root = (s / lora.scaling).sqrt()
    assert torch.allclose(split["m.lora_A"].norm(dim=1), root, rtol=1e-5)
    assert torch.allclose(split["m.lora_B"].norm(dim=0), root, rtol=1e-5)


@pytest.mark.parametrize("lora", SPECS)
def test_a_start_is_pefts_svd_of_the_clients(lora: LoraSpec) -> None:
    clients = [(own.outcome, own.lora, own.num_examples / 8) for own in cohort()]
    theirs = tiny.peft_mean(clients, "svd", svd_rank=lora.rank)
    own = start_of(FlexLora(), state_of(FlexLora(), 6), lora)
    assert gap(lora.scaling * tiny.dense(own), theirs) < 1e-5


@pytest.mark.parametrize("balanced", [False, True])
def test_a_fresh_state_is_no_update_but_can_be_trained(balanced: bool) -> None:
    strategy = FlexLora(balanced)
    fresh = {**tiny.pair(6, 0), "m.lora_B": torch.zeros(10, 6)}
    own = start_of(strategy, strategy.init(fresh, 0), LoraSpec(2, 4.0))
    assert not own["m.lora_B"].any()
    assert bool(own["m.lora_A"].any(dim=1).all())  # B = 0 and A = 0 would never move
    assert bool(torch.isfinite(own["m.lora_A"]).all())


def test_directions_that_no_client_has_can_still_be_trained() -> None:
    """One client of rank 2 below a global rank of 6: its zero columns of B keep a row of A."""
    strategy = FlexLora()
    state = strategy.init(tiny.pair(6, 0), 0)
    state = tiny.play(strategy, state, [tiny.Scripted(tiny.pair(2, 1), 1, LoraSpec(2, 2.0))])
    own = start_of(strategy, state, LoraSpec(6, 6.0))
    assert gap(tiny.dense(own), tiny.dense(tiny.pair(2, 1))) < 1e-6
    assert not own["m.lora_B"][:, 2:].any()
    assert bool(own["m.lora_A"].any(dim=1).all())


def test_bytes_both_ways_are_those_of_a_clients_own_rank(tmp_path: Path) -> None:
    sizes = [Size(A=3, B=5, head=2), Size(A=6, B=10, head=2)]
    assert FlexLora().cost(sizes) == [Cost(up=40, down=40), Cost(up=72, down=72)]
    run = tiny.start(
        tiny.config("flexlora", cohort=4, ranks=[2, 4, 8], alphas=[4.0, 4.0, 4.0]),
        "llama",
        tmp_path,
    )
    one = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # A and B of rank 1 on one layer
    for _ in range(2):
        run.step()
        for client in run.network.sent:
            size = 4 * one * run.federation.lora(client).rank
            assert messages.content_bytes(run.network.received[client]) == size
            assert messages.content_bytes(run.network.update(client)) == size
    assert {run.federation.lora(client).rank for client in tiny.CLIENTS} == {2, 4, 8}


def test_a_head_is_averaged_by_examples() -> None:
    strategy = FlexLora()
    state = strategy.init({"bias": torch.tensor([10.0]), **tiny.pair(1, 0)}, 0)
    clients = [
        tiny.Scripted({**tiny.pair(1, seed), "bias": torch.tensor([value])}, n)
        for seed, value, n in ((1, 14.0, 1), (2, 6.0, 3))
    ]
    assert tiny.play(strategy, state, clients)["head"]["bias"].tolist() == [8.0]
