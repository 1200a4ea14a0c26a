from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from corolla.strategies.fedavg import FedAvg
from corolla.tensors import factors
from corolla.types import Cost, Params, Size
from tests.strategies import tiny


def module(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], head: float = 0.0) -> Params:
    """A (r, 2), B (2, r) and a head of one value."""
    return {"m.lora_A": torch.tensor(a), "m.lora_B": torch.tensor(b), "bias": torch.tensor([head])}


START = module([[1.0, 0.0]], [[0.0], [0.0]], 10.0)
ADA = module([[2.0, 4.0]], [[1.0], [-1.0]], 14.0)
BEN = module([[6.0, 0.0]], [[5.0], [3.0]], 6.0)


def round_of(*clients: tuple[Params, int]) -> Params:
    strategy = FedAvg()
    scripted = [tiny.Scripted(params, n) for params, n in clients]
    state = tiny.play(strategy, strategy.init(START, 0), scripted)
    return strategy.adapter(state).trained


def test_two_clients_by_hand() -> None:
    """p = 1/4 and 3/4: Ā = (2 + 3·6, 4 + 0) / 4, B̄ = (1 + 3·5, -1 + 3·3) / 4."""
    mean = round_of((ADA, 1), (BEN, 3))
    assert mean["m.lora_A"].tolist() == [[5.0, 1.0]]
    assert mean["m.lora_B"].tolist() == [[4.0], [2.0]]
    assert mean["bias"].tolist() == [8.0]  # (14 + 3·6) / 4


def test_what_it_misses_is_the_weighted_covariance_by_hand() -> None:
    """Σ p B A = (1·(1)(2, 4) + 3·(5)(6, 0)) / 4 in the first row; B̄ Ā = 4·(5, 1)."""
    mean = round_of((ADA, 1), (BEN, 3))
    ideal = torch.tensor([[92 / 4, 4 / 4], [(-2 + 54) / 4, -4 / 4]])
    missed = ideal - mean["m.lora_B"] @ mean["m.lora_A"]
    # p (B - B̄)(A - Ā): ada ((-3), (-3))(-3, 3) / 4, ben ((1), (1))(1, -1)·3 / 4
    assert missed.tolist() == [[3.0, -3.0], [3.0, -3.0]]


@pytest.mark.parametrize("shared", ["m.lora_A", "m.lora_B"])
def test_exact_when_the_clients_agree_on_one_factor(shared: str) -> None:
    ben = {**BEN, shared: ADA[shared]}
    mean = round_of((ADA, 1), (ben, 3))
    ideal = sum(
        p * params["m.lora_B"] @ params["m.lora_A"] for p, params in ((0.25, ADA), (0.75, ben))
    )
    assert torch.equal(mean["m.lora_B"] @ mean["m.lora_A"], torch.as_tensor(ideal))


def test_one_client_decides_alone() -> None:
    assert tiny.same(round_of((BEN, 7)), BEN)


def test_sends_differences() -> None:
    """So that a weight of an absent client never stands in for the global model."""
    update = FedAvg().local(tiny.Scripted(ADA, 5), {"adapter": START})
    assert update.payload["adapter"]["bias"].tolist() == [4.0]
    assert update.payload["adapter"]["m.lora_A"].tolist() == [[1.0, 4.0]]
    assert update.num_examples == 5


def test_trains_everything_from_the_global_model() -> None:
    client = tiny.Scripted(ADA, 1)
    FedAvg().local(client, {"adapter": START})
    (asked,) = client.asked
    assert tiny.same(asked["start"], START)
    assert not asked["frozen"]
    assert all(asked["train"](name) for name in START)


def test_misses_the_weighted_covariance_in_a_real_round(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("fedavg", rslora=True), "gpt2", tmp_path / "memory")
    run.step()
    run.step()
    found, ideal, network = tiny.saved(run, tmp_path / "adapter"), run.network.mean(), run.network
    scaling, total = 8.0 / 4**0.5, sum(network.examples.values())
    p = {client: n / total for client, n in network.examples.items()}
    covariance: dict[str, torch.Tensor] = {}
    for name in ideal:
        a = {c: t[name + ".lora_A"].double() for c, t in network.trained.items()}
        b = {c: t[name + ".lora_B"].double() for c, t in network.trained.items()}
        mean_a = torch.stack([p[c] * a[c] for c in p]).sum(0)
        mean_b = torch.stack([p[c] * b[c] for c in p]).sum(0)
        centred = [p[c] * (b[c] - mean_b) @ (a[c] - mean_a) for c in p]
        covariance[name] = scaling * torch.stack(centred).sum(0).T  # Conv1D is (in, out)
    assert tiny.relative(found, ideal) > 0.01
    corrected = {name: found[name] + covariance[name] for name in ideal}
    assert tiny.relative(corrected, ideal) < 1e-6


def test_averages_a_head_exactly_with_the_clients_weights(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("fedavg"), "bert", tmp_path / "memory")
    run.step()
    ideal = {n: t for n, t in run.network.mean().items() if n.startswith("classifier")}
    assert len(ideal) == 2
    assert tiny.relative(tiny.saved(run, tmp_path / "adapter"), ideal) < 1e-6
    plain = {n: torch.stack([w[n] for w in run.network.dense.values()]).mean(0) for n in ideal}
    assert tiny.relative(plain, ideal) > 0.01  # the weights matter here


def test_cost_is_the_adapter_both_ways(tmp_path: Path) -> None:
    sizes = [Size(A=3, B=5, head=2), Size(A=3, B=5, head=2)]
    assert FedAvg().cost(sizes) == [Cost(up=40, down=40)] * 2
    run = tiny.start(tiny.config("fedavg"), "llama", tmp_path)
    first = run.step()
    # q, o: 4·(32 + 32); k, v: 4·(32 + 16); gate, up, down: 4·(32 + 48)
    assert first.traffic.up == first.traffic.down == 3 * 4 * (2 * 256 + 2 * 192 + 3 * 320)
    size = factors.size(run.network.update("a")["adapter"])
    assert size.A + size.B == 2 * 256 + 2 * 192 + 3 * 320
