from pathlib import Path

import pytest
import torch

from corolla.strategies.fedsvd import FedSvd
from corolla.tensors import tree
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from tests.strategies import tiny

SPEC = LoraSpec(3, 6.0)


def first(seed: int = 0) -> Payload:
    return FedSvd().init({**tiny.pair(3, seed), "m.lora_B": torch.zeros(10, 3)}, 0)


def clients(*seeds: int) -> list[tiny.Scripted]:
    return [tiny.Scripted(tiny.pair(3, seed), n, SPEC) for n, seed in enumerate(seeds, 1)]


def factors_of(state: Payload) -> Params:
    return FedSvd().adapter(state).trained


def test_one_client_by_hand() -> None:
    """B A = (2, 0)ᵀ (3, 4) = 10 · e₁ (0.6, 0.8)."""
    state = FedSvd().init(
        {"m.lora_A": torch.tensor([[3.0, 4.0]]), "m.lora_B": torch.zeros(2, 1)}, 0
    )
    ends = {"m.lora_A": torch.ones(1, 2), "m.lora_B": torch.tensor([[2.0], [0.0]])}
    found = factors_of(tiny.play(FedSvd(), state, [tiny.Scripted(ends, 1)]))
    assert found["m.lora_A"].abs().flatten().tolist() == pytest.approx([0.6, 0.8])
    assert found["m.lora_B"].abs().flatten().tolist() == pytest.approx([10.0, 0.0])
    assert tiny.dense(found).flatten().tolist() == pytest.approx([6.0, 8.0, 0.0, 0.0])


def test_the_product_is_the_mean_and_the_decomposition_does_not_change_it() -> None:
    state = first()
    for round in range(1, 4):
        a = state["A"]["m.lora_A"]
        members = clients(round, round + 10, round + 20)
        state = tiny.play(FedSvd(), state, members)
        ideal = torch.stack(
            [own.num_examples / 6 * tiny.dense({**own.outcome, "m.lora_A": a}) for own in members]
        ).sum(0)
        found = factors_of(state)
        assert float((tiny.dense(found) - ideal).norm() / ideal.norm()) < 1e-6
        _, s, vt = torch.linalg.svd(ideal, full_matrices=False)
        product = found["m.lora_A"].double() @ vt[:3].T
        assert torch.allclose(product.abs(), torch.eye(3).double(), atol=1e-5)
        assert torch.allclose(found["m.lora_B"].norm(dim=0).double(), s[:3], rtol=1e-5)


def test_rows_of_a_are_orthonormal_and_columns_of_b_orthogonal() -> None:
    found = factors_of(tiny.play(FedSvd(), first(), clients(1, 2)))
    a, b = found["m.lora_A"].double(), found["m.lora_B"].double()
    assert torch.allclose(a @ a.T, torch.eye(3).double(), atol=1e-6)
    gram = b.T @ b
    assert float((gram - gram.diag().diag()).abs().max() / gram.max()) < 1e-6


def test_a_turns_within_the_rows_it_had() -> None:
    """One round cannot leave the space of A: only B is trained."""
    state = first()
    before = state["A"]["m.lora_A"].double()
    for after in (tiny.play(FedSvd(), state, clients(1, 2)), still(state)):
        a = after["A"]["m.lora_A"].double()
        inside = torch.linalg.pinv(before) @ before  # the projector onto the rows of A
        assert torch.allclose(a @ inside, a, atol=1e-6)
        assert torch.allclose(a @ a.T, torch.eye(3).double(), atol=1e-6)


def still(state: Payload) -> Payload:
    """After a round in which nothing moved: B is still zero."""
    zero = {"m.lora_B": torch.zeros(10, 3)}
    after = tiny.play(FedSvd(), state, [tiny.Scripted(zero, 1, SPEC)])
    assert not after["adapter"]["m.lora_B"].any()
    return after


def test_clients_train_and_send_b_alone() -> None:
    client = clients(1)[0]
    (update,) = tiny.scripted(FedSvd(), first(), [client])
    assert update.payload["adapter"].keys() == {"m.lora_B"}
    assert not client.asked[0]["train"]("m.lora_A")
    assert tiny.same({"m.lora_A": client.asked[0]["start"]["m.lora_A"]}, first()["A"])
    assert FedSvd().aggregator().linear


def test_a_head_is_averaged_and_not_decomposed() -> None:
    state = FedSvd().init({**tiny.pair(1, 0), "bias": torch.tensor([10.0])}, 0)
    members = [
        tiny.Scripted({**tiny.pair(1, seed), "bias": torch.tensor([value])}, n)
        for seed, value, n in ((1, 14.0, 1), (2, 6.0, 3))
    ]
    assert factors_of(tiny.play(FedSvd(), state, members))["bias"].tolist() == [8.0]


def test_real_rounds_keep_a_on_the_devices_and_orthonormal(tmp_path: Path) -> None:
    assert FedSvd().cost([Size(A=3, B=5, head=2)]) == [Cost(up=28, down=40)]
    run = tiny.start(tiny.config("fedsvd"), "gpt2", tmp_path)
    digests = set()
    for _ in range(3):
        before = run.state["A"]
        run.step()
        for own in run.network.trained.values():
            assert all(torch.equal(own[name], a) for name, a in before.items())
        digests.add(tree.digest(run.state["A"]))
        for a in run.state["A"].values():
            assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
    assert len(digests) == 3
