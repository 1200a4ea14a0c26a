import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.strategies.fedavg import FedAvg
from corolla.strategies.lora_fair import LoraFair
from corolla.types import Cost, LoraSpec, Params, Size
from tests.strategies import tiny

SPEC = LoraSpec(3, 6.0)
EXAMPLES = [1, 3, 4, 2]


def cohort(stretch: float = 1.0) -> list[tiny.Scripted]:
    """Four clients of rank 3; `stretch` moves size from A to B, product by product."""
    found = []
    for seed, n in enumerate(EXAMPLES, 1):
        own = tiny.pair(3, seed, 14, 12)
        own = {"m.lora_A": own["m.lora_A"] / stretch, "m.lora_B": own["m.lora_B"] * stretch}
        found.append(tiny.Scripted(own, n, SPEC))
    return found


def exact() -> Tensor:
    terms = [own.num_examples / 10 * tiny.dense(own.outcome) for own in cohort()]
    return torch.stack(terms).sum(0)


def fair(penalty: float, clients: list[tiny.Scripted] | None = None) -> Params:
    strategy = LoraFair(penalty)
    state = strategy.init(tiny.pair(3, 0, 14, 12), 0)
    return strategy.adapter(tiny.play(strategy, state, clients or cohort())).trained


def plain() -> Params:
    strategy = FedAvg()
    state = strategy.init(tiny.pair(3, 0, 14, 12), 0)
    return strategy.adapter(tiny.play(strategy, state, cohort())).trained


def error(params: Params) -> float:
    return float((tiny.dense(params) - exact()).norm())


@pytest.mark.parametrize(("penalty", "step"), [(0.0, 12 / 26), (1.0, 12 / 52), (12.0, 12 / 338)])
def test_two_clients_by_hand(penalty: float, step: float) -> None:
    """Ā = (5, 1), B̄ = (4, 2), R = ((3, -3), (3, -3)): ΔB = 12 / (26 + penalty · 26) in both rows.

    R Āᵀ = (15 - 3, 15 - 3), Ā Āᵀ = 26.
    """
    start = {"m.lora_A": torch.tensor([[1.0, 0.0]]), "m.lora_B": torch.zeros(2, 1)}
    ada = {"m.lora_A": torch.tensor([[2.0, 4.0]]), "m.lora_B": torch.tensor([[1.0], [-1.0]])}
    ben = {"m.lora_A": torch.tensor([[6.0, 0.0]]), "m.lora_B": torch.tensor([[5.0], [3.0]])}
    strategy = LoraFair(penalty)
    clients = [tiny.Scripted(ada, 1), tiny.Scripted(ben, 3)]
    found = strategy.adapter(tiny.play(strategy, strategy.init(start, 0), clients)).trained
    assert found["m.lora_A"].tolist() == [[5.0, 1.0]]
    assert found["m.lora_B"].flatten().tolist() == pytest.approx([4 + step, 2 + step], rel=1e-6)


def test_a_large_penalty_is_fedavg() -> None:
    assert tiny.relative(fair(1e9), plain()) < 1e-6
    assert tiny.relative(fair(0.01), plain()) > 0.01


def test_a_smaller_penalty_is_never_further_from_exact() -> None:
    errors = [error(fair(penalty)) for penalty in (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0, 1e3)]
    assert errors == sorted(errors)
    assert len(set(errors)) == len(errors)
    assert errors[-1] < error(plain())


def test_without_penalty_b_is_the_least_squares_one_for_the_mean_of_a() -> None:
    found = fair(0.0)
    solution = np.linalg.lstsq(found["m.lora_A"].double().numpy().T, exact().numpy().T)[0].T
    np.testing.assert_allclose(found["m.lora_B"].numpy(), solution, rtol=1e-4, atol=1e-5)
    left = (exact() - tiny.dense(found)) @ found["m.lora_A"].double().T
    assert float(left.abs().max()) < 1e-4  # what is missing has no part in the rows of Ā


@pytest.mark.parametrize("penalty", [0.01, 0.5])
def test_with_a_penalty_b_is_numpys_ridge_regression(penalty: float) -> None:
    """λ = penalty · tr(Ā Āᵀ) / 3, as rows √λ I below the least squares problem."""
    found, mean = fair(penalty), plain()
    a, b = (mean[f"m.lora_{role}"].double().numpy() for role in "AB")
    rows = np.sqrt(penalty * np.trace(a @ a.T) / 3) * np.eye(3)
    missing = exact().numpy() - b @ a
    step = np.linalg.lstsq(np.vstack([a.T, rows]), np.vstack([missing.T, np.zeros((3, 14))]))[0].T
    np.testing.assert_allclose(found["m.lora_B"].numpy(), b + step, rtol=1e-5, atol=1e-6)


def test_a_is_fedavgs_whatever_the_penalty() -> None:
    for penalty in (0.0, 0.01, 100.0):
        assert torch.equal(fair(penalty)["m.lora_A"], plain()["m.lora_A"])


def test_a_penalty_is_relative_to_the_size_of_a() -> None:
    """(B c, A / c) has the same products, and the same correction of them."""
    wanted = tiny.dense(fair(0.1))
    found = tiny.dense(fair(0.1, cohort(stretch=8.0)))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_agreeing_clients_need_no_correction() -> None:
    same = [tiny.Scripted(cohort()[0].outcome, n, SPEC) for n in EXAMPLES]
    assert tiny.relative(fair(0.01, same), same[0].outcome) < 1e-6


def test_costs_what_fedavg_costs() -> None:
    sizes = [Size(A=3, B=5, head=2)] * 2
    assert LoraFair().cost(sizes) == FedAvg().cost(sizes) == [Cost(up=40, down=40)] * 2


@pytest.mark.parametrize("penalty", [-0.1, float("nan")])
def test_a_penalty_that_makes_no_sense_is_refused(penalty: float) -> None:
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        LoraFair(penalty)
