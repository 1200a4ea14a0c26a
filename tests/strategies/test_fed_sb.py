from pathlib import Path

import pytest
import torch

from corolla.strategies.fed_sb import FedSb
from corolla.tensors import tree
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from corolla.wire import messages
from tests.strategies import tiny

SPEC = LoraSpec(3, 3.0)
FRESH: Params = {**tiny.pair(3, 0), "m.lora_B": torch.zeros(10, 3)}


def core(seed: int) -> Params:
    return {"m.lora_R": torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))}


def product(state: Payload) -> torch.Tensor:
    return tiny.dense(FedSb().adapter(state).trained)


def test_starts_as_the_base_model_between_orthonormal_factors() -> None:
    state = FedSb().init(FRESH, 0)
    a, b = state["basis"]["m.lora_A"].double(), state["basis"]["m.lora_B"].double()
    assert torch.allclose(a @ a.T, torch.eye(3).double(), atol=1e-6)
    assert torch.allclose(b.T @ b, torch.eye(3).double(), atol=1e-6)
    assert not state["adapter"]["m.lora_R"].any()
    assert not product(state).any()


def test_a_start_that_is_an_update_keeps_it_as_singular_vectors_and_values() -> None:
    """B R A is the start's own product: what LoRA-SB makes of a gradient."""
    state = FedSb().init(tiny.pair(3, 1), 0)
    wanted = tiny.dense(tiny.pair(3, 1))
    assert float((product(state) - wanted).norm() / wanted.norm()) < 1e-6
    r = state["adapter"]["m.lora_R"]
    assert torch.equal(r, r.diag().diag())
    assert torch.allclose(r.diag().double(), torch.linalg.svdvals(wanted)[:3], rtol=1e-6)


def test_each_module_and_seed_has_a_random_b_of_its_own() -> None:
    """Two modules of one shape must not share their B."""
    other = {name.replace("m.", "n."): tensor for name, tensor in FRESH.items()}
    first = FedSb().init({**FRESH, **other}, 0)["basis"]
    again = FedSb().init(FRESH, 0)["basis"]
    assert torch.equal(first["m.lora_B"], again["m.lora_B"])
    assert not torch.allclose(first["m.lora_B"], first["n.lora_B"], atol=1e-3)
    assert not torch.allclose(first["m.lora_B"], FedSb().init(FRESH, 1)["basis"]["m.lora_B"])


def test_two_clients_by_hand() -> None:
    """R = (2 + 3·6) / 4 at rank one."""
    start = {"m.lora_A": torch.tensor([[2.0, 0.0]]), "m.lora_B": torch.zeros(2, 1)}
    clients = [
        tiny.Scripted({"m.lora_R": torch.tensor([[value]])}, n) for value, n in ((2.0, 1), (6.0, 3))
    ]
    state = FedSb().init(start, 0)
    state = tiny.play(FedSb(), state, clients)
    assert state["adapter"]["m.lora_R"].tolist() == [[5.0]]
    b = state["basis"]["m.lora_B"].double()
    assert torch.allclose(product(state), 5 * b @ torch.tensor([[1.0, 0.0]]).double(), atol=1e-6)


def test_the_mean_of_cores_is_the_mean_of_products() -> None:
    state = FedSb().init(FRESH, 0)
    a, b = (state["basis"][f"m.lora_{role}"].double() for role in "AB")
    clients = [tiny.Scripted(core(seed), n, SPEC) for n, seed in ((1, 1), (3, 2), (4, 3))]
    products = [own.num_examples / 8 * b @ own.outcome["m.lora_R"].double() @ a for own in clients]
    ideal = torch.stack(products).sum(0)
    found = product(tiny.play(FedSb(), state, clients))
    assert float((found - ideal).norm() / ideal.norm()) < 1e-6


def test_only_the_core_is_trained_and_sent() -> None:
    client = tiny.Scripted(core(1), 1, SPEC)
    (update,) = tiny.scripted(FedSb(), FedSb().init(FRESH, 0), [client])
    assert update.payload["adapter"].keys() == {"m.lora_R"}
    assert client.asked[0]["train"]("m.lora_R")
    assert not client.asked[0]["train"]("m.lora_B")
    assert FedSb().aggregator().linear


@pytest.mark.parametrize("width", [1, 10, 1000])
def test_bytes_do_not_depend_on_the_width_of_the_model(width: int) -> None:
    """L r² values both ways; A and B once."""
    size = Size(A=width * 3, B=width * 5, head=2, rank=3, modules=7)
    (cost,) = FedSb().cost([size])
    assert cost == Cost(up=4 * 65, down=4 * 65, once=4 * width * 8)


def test_real_rounds_leave_a_and_b_as_they_were_and_send_them_once(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("fed_sb", cohort=4), "llama", tmp_path)
    basis = tree.digest(run.state["basis"])
    for round in range(1, 4):
        run.step()
        assert tree.digest(run.state["basis"]) == basis
        for client, received in run.network.received.items():
            assert ("basis" in received) == (round == 1)
            assert messages.content_bytes(run.network.update(client)) == 4 * 7 * 4**2
            held = run.network.trained[client]  # with R · A in the place of A
            for name, b in run.state["basis"].items():
                if name.endswith(".lora_B"):
                    assert torch.equal(held[name], b)
    assert all(bool(core.any()) for core in run.state["adapter"].values())
