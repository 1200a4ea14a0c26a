from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from corolla.aggregation.stacks import MeanAndResidual
from corolla.strategies.fedex_lora import FedExLora
from corolla.tensors import tree
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from tests.strategies import tiny

SPEC = LoraSpec(2, 6.0)
OUT, INTO = 20, 16
EXAMPLES = [1, 3, 4, 2]


def clients(number: int) -> list[tiny.Scripted]:
    """Each trains to factors of its own."""
    return [
        tiny.Scripted(tiny.pair(2, seed, OUT, INTO), n, SPEC)
        for seed, n in zip(range(1, number + 1), EXAMPLES, strict=False)
    ]


def exact(cohort: Sequence[tiny.Scripted]) -> Tensor:
    """Σ p_m B_m A_m, dense."""
    total = sum(own.num_examples for own in cohort)
    terms = [own.num_examples / total * tiny.dense(own.outcome) for own in cohort]
    return torch.stack(terms).sum(0)


def effective(strategy: FedExLora, state: Payload) -> Tensor:
    """B A and all residuals, at the same scaling."""
    adapter = strategy.adapter(state)
    return torch.stack([tiny.dense(own) for own in (adapter.trained, *adapter.residuals)]).sum(0)


def first(strategy: FedExLora) -> Payload:
    return strategy.init(tiny.pair(2, 0, OUT, INTO), 0)


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_two_clients_by_hand() -> None:
    """Means as FedAvg's; what their product lacks is ((3, -3), (3, -3)): see test_fedavg."""
    start = {"m.lora_A": torch.tensor([[1.0, 0.0]]), "m.lora_B": torch.zeros(2, 1)}
    ada = {"m.lora_A": torch.tensor([[2.0, 4.0]]), "m.lora_B": torch.tensor([[1.0], [-1.0]])}
    ben = {"m.lora_A": torch.tensor([[6.0, 0.0]]), "m.lora_B": torch.tensor([[5.0], [3.0]])}
    strategy = FedExLora()
    cohort = [tiny.Scripted(ada, 1), tiny.Scripted(ben, 3)]
    adapter = strategy.adapter(tiny.play(strategy, strategy.init(start, 0), cohort))
    assert adapter.trained["m.lora_A"].tolist() == [[5.0, 1.0]]
    assert adapter.trained["m.lora_B"].tolist() == [[4.0], [2.0]]
    (residual,) = adapter.residuals
    assert tiny.dense(residual).tolist() == [[3.0, -3.0], [3.0, -3.0]]
    # (B_ada - B_ben) p_ada (A_ada - Ā)
    assert residual["m.lora_B"].tolist() == [[-4.0], [-4.0]]
    assert residual["m.lora_A"].tolist() == [[-0.75, 0.75]]


@pytest.mark.parametrize("number", [2, 3, 4])
def test_residual_is_the_weighted_covariance_of_rank_m_minus_one_times_r(number: int) -> None:
    """In fp64 to 1e-12."""
    cohort = clients(number)
    total = sum(own.num_examples for own in cohort)
    shares = [own.num_examples / total for own in cohort]
    double = [{n: t.double() for n, t in own.outcome.items()} for own in cohort]
    aggregator = MeanAndResidual()
    for own, params in zip(cohort, double, strict=True):
        aggregator.add({"adapter": params}, own.num_examples)
    residual = aggregator.finalise()["residual"]
    means = {
        n: torch.stack([p * own[n] for p, own in zip(shares, double, strict=True)]).sum(0)
        for n in double[0]
    }
    centred = [{n: own[n] - means[n] for n in own} for own in double]
    covariance = torch.stack(
        [p * tiny.dense(own) for p, own in zip(shares, centred, strict=True)]
    ).sum(0)
    assert gap(tiny.dense(residual), covariance) < 1e-12
    assert gap(tiny.dense(residual), exact(cohort) - tiny.dense(means)) < 1e-12
    rank = (number - 1) * 2
    assert int(torch.linalg.matrix_rank(covariance)) == rank
    assert residual["m.lora_A"].shape == (rank, INTO)
    assert residual["m.lora_B"].shape == (OUT, rank)


def test_adapter_and_residual_are_pefts_cat() -> None:
    strategy, cohort = FedExLora(), clients(3)
    state = tiny.play(strategy, first(strategy), cohort)
    theirs = tiny.peft_mean([(own.outcome, SPEC, own.num_examples / 8) for own in cohort], "cat")
    assert gap(SPEC.scaling * effective(strategy, state), theirs) < 1e-6


def test_residuals_of_earlier_rounds_stay() -> None:
    """W ← W + s (Σ p B A - B̄ Ā) adds up; the product of the means is replaced."""
    strategy = FedExLora(compact_at=100.0)
    state, frozen = first(strategy), torch.zeros(OUT, INTO, dtype=torch.float64)
    for round in range(3):
        cohort = [
            tiny.Scripted(tiny.pair(2, 10 * round + seed, OUT, INTO), n, SPEC)
            for seed, n in ((1, 1), (2, 3))
        ]
        state = tiny.play(strategy, state, cohort)
        adapter = strategy.adapter(state)
        assert len(adapter.residuals) == round + 1
        wanted = frozen + exact(cohort)
        assert gap(effective(strategy, state), wanted) < 1e-6
        frozen = wanted - tiny.dense(adapter.trained)


def test_clients_go_on_from_trained_adapters_beside_the_residuals() -> None:
    strategy, cohort = FedExLora(), clients(3)
    state = tiny.play(strategy, first(strategy), cohort)
    again = clients(1)
    tiny.scripted(strategy, state, again)
    (asked,) = again[0].asked
    assert tiny.same(asked["start"], strategy.adapter(state).trained)
    assert all(asked["train"](name) for name in asked["start"])
    found = torch.stack([tiny.dense(block) for block in asked["frozen"]]).sum(0)
    (residual,) = strategy.adapter(state).residuals
    assert gap(found, SPEC.scaling * tiny.dense(residual)) < 1e-6  # frozen blocks have scaling 1


def test_agreeing_clients_leave_no_residual() -> None:
    """One client alone, and clients that agree on A."""
    strategy = FedExLora()
    alone = tiny.play(strategy, first(strategy), clients(1))
    assert strategy.adapter(alone).residuals == ()
    assert tiny.relative(strategy.adapter(alone).trained, clients(1)[0].outcome) < 1e-6
    shared = clients(1)[0].outcome["m.lora_A"]
    agree = [tiny.Scripted({**own.outcome, "m.lora_A": shared}, 1, SPEC) for own in clients(3)]
    state = tiny.play(strategy, first(strategy), agree)
    (residual,) = strategy.adapter(state).residuals
    assert float(tiny.dense(residual).norm() / exact(agree).norm()) < 1e-6


@pytest.mark.parametrize("kept", [1, 3])
def test_a_truncated_residual_is_the_best_one_and_says_its_error(kept: int) -> None:
    strategy, cohort = FedExLora(residual_rank=kept), clients(4)
    aggregator = strategy.aggregator()
    state = first(strategy)
    for own, update in zip(cohort, tiny.scripted(strategy, state, cohort), strict=True):
        aggregator.add(update.payload, own.num_examples)
    after, metrics = strategy.apply(state, aggregator.finalise())
    adapter = strategy.adapter(after)
    missing = exact(cohort) - tiny.dense(adapter.trained)
    u, s, vt = torch.linalg.svd(missing)
    (residual,) = adapter.residuals
    assert residual["m.lora_A"].shape == (kept, INTO)
    assert gap(tiny.dense(residual), (u[:, :kept] * s[:kept]) @ vt[:kept]) < 1e-5
    tail = float((s[kept:].square().sum() / s.square().sum()).sqrt())
    assert metrics["truncation_error"] == pytest.approx(tail, rel=1e-5)
    assert metrics["frozen_rank"] == kept


@pytest.mark.parametrize("kept", [2, 3])
def test_a_cut_is_the_dense_svd_of_adapter_and_residuals(kept: int) -> None:
    """Clients go on from a part of rank 2 of it; with max_rank 2 nothing is left beside."""
    strategy, cohort = FedExLora(), clients(4)
    state = tiny.play(strategy, first(strategy), cohort)
    same, told = strategy.cut(state, strategy.rank_after(1, [Size(32, 40, rank=2)] * 4))
    assert tree.digest_all(same) == tree.digest_all(state)
    assert told == {"rank_error": 0.0}
    after, told = strategy.cut(state, kept)
    u, s, vt = np.linalg.svd(effective(strategy, state).numpy())
    best = torch.from_numpy((u[:, :kept] * s[:kept]) @ vt[:kept])
    assert gap(effective(strategy, after), best) < 1e-6
    tail = float(np.sqrt((s[kept:] ** 2).sum() / (s**2).sum()))
    assert tail > 0.05
    assert told == {"frozen_rank": kept - 2, "rank_error": pytest.approx(tail, rel=1e-6)}
    adapter = strategy.adapter(after)
    assert adapter.trained["m.lora_A"].shape == (2, INTO)
    assert len(adapter.residuals) == kept - 2
    before = strategy.adapter(state).trained["m.lora_A"].norm(dim=1).mean()
    lengths = adapter.trained["m.lora_A"].norm(dim=1)
    assert torch.allclose(lengths, before.expand(2), rtol=1e-5)


def test_cost_is_as_floras() -> None:
    """M P_AB down, in the first exact form; less with a truncated residual."""
    size = Size(A=32, B=40, head=3, rank=2)
    assert FedExLora().cost([size] * 3) == [Cost(up=4 * 75, down=4 * (3 * 72 + 3))] * 3
    short = FedExLora(residual_rank=1).cost([size] * 3)
    assert short == [Cost(up=4 * 75, down=4 * (72 + 36 + 3))] * 3
    assert FedExLora(residual_rank=9).cost([size] * 3) == FedExLora().cost([size] * 3)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_logits_are_those_of_the_dense_mean(model: str, tmp_path: Path) -> None:
    """The server's model against the base whose weights are those of the ideal average."""
    run = tiny.start(tiny.config("fedex_lora", rslora=True), model, tmp_path)
    run.step()
    run.step()
    base = tiny.base(model).model
    weights: dict[str, Tensor] = {}
    for name, delta in run.network.mean().items():
        full = name if name.startswith("classifier") else f"{name}.weight"
        weights[full] = (base.get_parameter(full).double() + delta).float()
    with torch.no_grad():
        wanted = functional_call(base, weights, kwargs={"input_ids": tiny.IDS}).logits
    run.model.show(run.federation.strategy.adapter(run.state), run.federation.config.lora)
    assert float((tiny.logits(run.model.model) - wanted).abs().max()) < 1e-5
    assert float((tiny.logits(base) - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_rank": 0}, "residual_rank must be a whole number from 1, found 0"),
        ({"residual_rank": 1.5}, "residual_rank must be a whole number from 1, found 1.5"),
        ({"compact_at": 0.5}, "compact_at must be at least 1, found 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedExLora(**options)  # type: ignore[arg-type]


def test_updates_hold_the_whole_adapter() -> None:
    fresh: Params = {**tiny.pair(2, 0), "bias": torch.zeros(2)}
    assert FedExLora().update_like(fresh, Size(16, 20)) == {"adapter": fresh}
