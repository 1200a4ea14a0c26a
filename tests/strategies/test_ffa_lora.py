from pathlib import Path

import pytest
import torch

from corolla.client.training.first_order import FirstOrder
from corolla.data.encoding import Encoded
from corolla.models.lora import LoraModel
from corolla.strategies.ffa_lora import FfaLora
from corolla.tensors import factors, tree
from corolla.types import Cost, LoraSpec, Params, Size
from tests.strategies import tiny

START = {
    "m.lora_A": torch.tensor([[1.0, 2.0]]),
    "m.lora_B": torch.tensor([[0.0], [0.0]]),
    "bias": torch.tensor([10.0]),
}


def test_two_clients_by_hand() -> None:
    """B̄ = (1 + 3·5, -1 + 3·3) / 4; A is where it was, whatever a client does to it."""
    strategy = FfaLora()
    moved = torch.tensor([[9.0, 9.0]])
    ada = {"m.lora_A": moved, "m.lora_B": torch.tensor([[1.0], [-1.0]]), "bias": torch.zeros(1)}
    ben = {"m.lora_A": moved, "m.lora_B": torch.tensor([[5.0], [3.0]]), "bias": torch.ones(1) * 4}
    clients = [tiny.Scripted(ada, 1), tiny.Scripted(ben, 3)]
    mean = strategy.adapter(tiny.play(strategy, strategy.init(START, 0), clients)).trained
    assert mean["m.lora_A"].tolist() == [[1.0, 2.0]]
    assert mean["m.lora_B"].tolist() == [[4.0], [2.0]]
    assert mean["bias"].tolist() == [3.0]  # (0 + 3·4) / 4


def test_mean_of_products_is_product_of_means() -> None:
    strategy, generator = FfaLora(), torch.Generator().manual_seed(0)
    start = {
        "m.lora_A": 0.1 * torch.randn(4, 30, generator=generator),
        "m.lora_B": torch.zeros(20, 4),
    }
    outcomes = [
        ({**start, "m.lora_B": 0.1 * torch.randn(20, 4, generator=generator)}, n) for n in (3, 8, 5)
    ]
    clients = [tiny.Scripted(outcome, n) for outcome, n in outcomes]
    mean = strategy.adapter(tiny.play(strategy, strategy.init(start, 0), clients)).trained
    ideal = sum(n / 16 * o["m.lora_B"].double() @ o["m.lora_A"].double() for o, n in outcomes)
    found = mean["m.lora_B"].double() @ mean["m.lora_A"].double()
    assert float((found - ideal).abs().max()) < 1e-8


@pytest.mark.parametrize("model", tiny.KINDS)
def test_a_is_the_same_everywhere_and_never_moves(model: str, tmp_path: Path) -> None:
    run = tiny.start(tiny.config("ffa_lora"), model, tmp_path)
    first = run.state["A"]
    digest = tree.digest(first)
    seen = 0
    for _ in range(3):
        run.step()
        for trained in run.network.trained.values():
            on_device = factors.select(trained, factors.is_a)
            assert tree.digest(on_device) == digest
            seen += 1
        assert tree.digest(run.state["A"]) == digest
    adapter = run.federation.strategy.adapter(run.state).trained
    assert tree.digest(factors.select(adapter, factors.is_a)) == digest
    assert seen == 9
    assert all(t.any() for n, t in adapter.items() if factors.is_b(n))


def test_a_travels_once_to_each_client(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("ffa_lora"), "bert", tmp_path)
    sent: dict[str, int] = {}
    for _ in range(4):
        run.step()
        for client, received in run.network.received.items():
            sent[client] = sent.get(client, 0) + ("A" in received)
            assert "adapter" in received
            assert not any(factors.is_a(name) for name in received["adapter"])
        for client in run.network.sent:
            assert not any(factors.is_a(name) for name in run.network.update(client)["adapter"])
    assert sent == dict.fromkeys(tiny.CLIENTS, 1)


def test_cost_is_b_and_the_head_with_a_once(tmp_path: Path) -> None:
    assert FfaLora().cost([Size(A=3, B=5, head=2)]) == [Cost(up=28, down=28, once=12)]
    run = tiny.start(tiny.config("ffa_lora", cohort=4), "llama", tmp_path)
    # q, k, v, o, gate, up: in 32, down: in 48; out 32, 16, 16, 32, 48, 48, 32
    a, b = 4 * (6 * 32 + 48), 4 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    first, second = run.step(), run.step()
    assert first.traffic.up == second.traffic.up == 4 * 4 * b
    assert first.traffic.down == 4 * 4 * (a + b)
    assert second.traffic.down == 4 * 4 * b


@pytest.fixture(scope="module")
def resident() -> LoraModel:
    return tiny.lora_model("llama")


def trajectory(model: LoraModel, alpha: float, lr: float) -> list[Params]:
    """s · B · A after each of a few SGD steps of the real trainer, A frozen."""
    spec = LoraSpec(4, alpha)
    settings = tiny.config("ffa_lora", optimizer="sgd", lr=lr, clip_norm=None, local_steps=1)
    rows = torch.randint(1, tiny.VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(0))
    data = [Encoded(row, row) for row in rows.tolist()]
    params, path = model.init(spec, 1), []
    for step in range(6):
        trainer = FirstOrder(model, spec, data, settings, seed=step, round=1)
        params = trainer.fit(params, train=lambda name: not factors.is_a(name)).params
        path.append(tiny.effective(model))
    return path


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_alpha_and_learning_rate_are_one_parameter_under_sgd(resident: LoraModel, c: float) -> None:
    """(alpha, lr) → (c · alpha, lr / c²) leaves the trajectory of s · B · A as it is."""
    wanted = trajectory(resident, 8.0, 2.0)
    found = trajectory(resident, c * 8.0, 2.0 / c**2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert tiny.relative(ours, theirs) < 1e-4  # fp32, six steps
    assert tiny.relative(wanted[0], wanted[-1]) > 0.5
    other = trajectory(resident, c * 8.0, 2.0 / c)
    assert tiny.relative(other[-1], wanted[-1]) > 0.1
