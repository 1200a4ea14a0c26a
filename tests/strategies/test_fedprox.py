from pathlib import Path

import pytest
import torch

from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedprox import FedProx
from corolla.tensors import tree
from tests.strategies import tiny

SGD = {"optimizer": "sgd", "clip_norm": None, "local_steps": 6}


def test_the_gradient_of_the_penalty_by_hand() -> None:
    """G + mu (w - w_t) = (1, 2) + 0.5 ((5, 7) - (1, 1)); what has no gradient gets none."""
    client = tiny.Scripted({}, 1)
    FedProx(mu=0.5).local(client, {"adapter": {"x": torch.ones(2), "y": torch.zeros(1)}})
    correct = client.asked[0]["correct"]
    found = correct({"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([5.0, 7.0])})
    assert {n: t.tolist() for n, t in found.items()} == {"x": [3.0, 5.0]}


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_without_mu_it_is_fedavg_bit_for_bit(model: str, tmp_path: Path) -> None:
    states = []
    for name, options in (("fedprox", {"mu": 0.0}), ("fedavg", {}), ("fedprox", {"mu": 0.1})):
        settings = tiny.config(name, options=options)
        run = tiny.start(settings, model, tmp_path / f"{name}{options}")
        run.step()
        run.step()
        states.append(tree.digest_all(run.state))
    assert states[0] == states[1] != states[2]


def moved(mu: float, lr: float, folder: Path) -> float:
    """How far one client goes in six steps of SGD."""
    settings = tiny.config("fedprox", options={"mu": mu}, cohort=1, **{**SGD, "lr": lr})
    run = tiny.start(settings, "llama", folder)
    run.step()
    return tree.norm(tree.sub(run.state["adapter"], run.first["adapter"]))


def test_a_larger_mu_stays_nearer(tmp_path: Path) -> None:
    found = [moved(mu, 0.02, tmp_path / str(mu)) for mu in (0.0, 1.0, 5.0, 20.0, 50.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


def test_the_limit_of_a_large_mu_is_the_start(tmp_path: Path) -> None:
    """With lr = 1 / mu each step forgets the one before, and goes |g| / mu."""
    near, nearer = (moved(mu, 1 / mu, tmp_path / str(mu)) for mu in (1e2, 1e4))
    assert nearer == pytest.approx(near / 100, rel=0.05)
    assert nearer < 1e-3


def test_all_else_is_fedavgs() -> None:
    """By hand: see test_fedavg."""
    start = {"m.lora_A": torch.tensor([[1.0, 0.0]]), "m.lora_B": torch.zeros(2, 1)}
    ada = {"m.lora_A": torch.tensor([[2.0, 4.0]]), "m.lora_B": torch.tensor([[1.0], [-1.0]])}
    ben = {"m.lora_A": torch.tensor([[6.0, 0.0]]), "m.lora_B": torch.tensor([[5.0], [3.0]])}
    clients = [tiny.Scripted(ada, 1), tiny.Scripted(ben, 3)]
    found, wanted = (
        tiny.play(strategy, strategy.init(start, 0), clients)["adapter"]
        for strategy in (FedProx(), FedAvg())
    )
    assert tiny.same(found, wanted)
    assert found["m.lora_A"].tolist() == [[5.0, 1.0]]


@pytest.mark.parametrize("mu", [-0.1, float("nan")])
def test_a_mu_that_makes_no_sense_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must be at least 0"):
        FedProx(mu)
