from dataclasses import replace

import pytest
import torch
from torch import Tensor

from corolla.strategies.fedavg import FedAvg
from corolla.strategies.hetlora import HetLora
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from tests.strategies import tiny

PLAIN = HetLora(penalty=0.0)
SPEC = LoraSpec(4, 8.0)


def of_norm(params: Params, norm: float) -> Params:
    """The same A, with B stretched so that |B A|_F is `norm`."""
    stretch = norm / float(tiny.dense(params).norm())
    return {**params, "m.lora_B": params["m.lora_B"] * stretch}


def first(strategy: HetLora, rank: int) -> Payload:
    return strategy.init(tiny.pair(rank, 0), 0)


def whole(strategy: HetLora, state: Payload) -> Params:
    """The global factors; each carries the root of the scaling."""
    (block,) = strategy.adapter(state).frozen
    return block


@pytest.mark.parametrize("normalise", [False, True])
def test_two_clients_of_different_rank_by_hand(normalise: bool) -> None:
    """|B A| = 1 for ada, 3 for ben: shares 1/4 and 3/4, and of the second row ben's alone."""
    ada = {"m.lora_A": torch.tensor([[1.0, 0.0]]), "m.lora_B": torch.tensor([[1.0], [0.0]])}
    ben = {
        "m.lora_A": torch.tensor([[5.0, 0.0], [0.0, 8.0]]),
        "m.lora_B": torch.tensor([[0.0, 0.0], [0.0, 3 / 8]]),
    }
    strategy = HetLora(penalty=0.0, normalise=normalise)
    clients = [tiny.Scripted(ada, 100, LoraSpec(1, 1.0)), tiny.Scripted(ben, 1, LoraSpec(2, 2.0))]
    state = strategy.init({"m.lora_A": torch.ones(2, 2), "m.lora_B": torch.zeros(2, 2)}, 0)
    found = whole(strategy, tiny.play(strategy, state, clients))
    tail = 1.0 if normalise else 0.75
    assert found["m.lora_A"].tolist() == [[4.0, 0.0], [0.0, 8 * tail]]
    assert found["m.lora_B"].tolist() == [[0.25, 0.0], [0.0, 3 / 8 * tail]]


def test_of_equal_ranks_and_norms_it_is_fedavg() -> None:
    clients = [tiny.Scripted(of_norm(tiny.pair(4, seed), 3.0), 5, SPEC) for seed in (1, 2, 3)]
    averaged = tiny.play(FedAvg(), FedAvg().init(tiny.pair(4, 0), 0), clients)["adapter"]
    for normalise in (False, True):
        strategy = HetLora(penalty=0.0, normalise=normalise)
        found = whole(strategy, tiny.play(strategy, first(strategy, 4), clients))
        root = SPEC.scaling**0.5
        assert tiny.relative(found, {n: root * t for n, t in averaged.items()}) < 1e-6


def test_weights_are_the_dense_norms_of_the_products() -> None:
    """Each client's share, read from an aggregate in which it is the only one with that A."""
    parts = [tiny.pair(rank, seed) for seed, rank in enumerate((2, 3, 5), 1)]
    norms = torch.stack([tiny.dense(part).norm() for part in parts])
    aggregator = PLAIN.aggregator()
    for part in parts:
        aggregator.add({"factors": part, "head": {}}, 1.0)
    found = aggregator.finalise()["factors"]
    padded = torch.zeros(3, 5, 8, dtype=torch.float64)
    for own, part in zip(padded, parts, strict=True):
        own[: len(part["m.lora_A"])] = part["m.lora_A"].double()
    wanted = (norms / norms.sum())[:, None, None] * padded
    assert torch.allclose(found["m.lora_A"].double(), wanted.sum(0), rtol=1e-6, atol=1e-7)


def test_examples_do_not_count_and_untrained_clients_count_alike() -> None:
    clients = [tiny.Scripted(tiny.pair(4, seed), 1, SPEC) for seed in (1, 2)]
    skewed = [replace(clients[0], num_examples=99), clients[1]]
    one, other = (tiny.play(PLAIN, first(PLAIN, 4), own)["global"] for own in (clients, skewed))
    assert tiny.same(one, other)
    zero = {"m.lora_B": torch.zeros(10, 4)}
    untrained = [replace(own, outcome={**own.outcome, **zero}) for own in clients]
    found = whole(PLAIN, tiny.play(PLAIN, first(PLAIN, 4), untrained))["m.lora_A"]
    mean = torch.stack([own.outcome["m.lora_A"] for own in clients]).mean(0)
    assert torch.allclose(found, SPEC.scaling**0.5 * mean, rtol=1e-6)


@pytest.mark.parametrize("c", [0.25, 16.0])
def test_scalings_do_not_count_beside_products(c: float) -> None:
    """(A, B, alpha) → (A / √c, B / √c, c alpha): the same update, so the same aggregate."""

    def aggregate(factor: float) -> Params:
        ada = {n: t / factor**0.5 for n, t in tiny.pair(4, 1).items()}
        clients = [
            tiny.Scripted(ada, 1, LoraSpec(4, 8.0 * factor)),
            tiny.Scripted(tiny.pair(2, 2), 1, LoraSpec(2, 1.0)),
        ]
        return tiny.play(PLAIN, first(PLAIN, 4), clients)["global"]

    assert tiny.relative(aggregate(c), aggregate(1.0)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_client_starts_from_its_first_rows_and_columns(rank: int) -> None:
    state = {"global": tiny.pair(4, 3), "head": {}}
    fitted = PLAIN.broadcast(state).fitted
    assert fitted is not None
    lora = LoraSpec(rank, 3.0)
    start = fitted(lora)["adapter"]
    root = lora.scaling**0.5
    assert torch.allclose(root * start["m.lora_A"], state["global"]["m.lora_A"][:rank])
    assert torch.allclose(root * start["m.lora_B"], state["global"]["m.lora_B"][:, :rank])
    again = tiny.play(PLAIN, state, [tiny.Scripted(start, 1, lora)])
    assert tiny.relative(whole(PLAIN, again), state["global"]) < 1e-6  # rows beyond it stay


# Rank self-pruning


def shrunk(params: Params, factor: float) -> Params:
    """The last row and column of rank 4 times a factor."""
    scale = torch.tensor([1.0, 1.0, 1.0, factor])
    return {
        "m.lora_A": params["m.lora_A"] * scale[:, None],
        "m.lora_B": params["m.lora_B"] * scale,
    }


@pytest.mark.parametrize(("factor", "rank"), [(0.9, 3), (1.0, 4), (1.1, 4)])
def test_the_tail_is_dropped_when_its_norm_has_fallen(factor: float, rank: int) -> None:
    """γ r = 0.99 · 4, rounded down; the rank stays on the device."""
    state = {"global": tiny.pair(4, 3), "head": {}}
    start = {n: t / SPEC.scaling**0.5 for n, t in state["global"].items()}
    client = tiny.Scripted(shrunk(start, factor), 1, SPEC)
    (update,) = tiny.scripted(HetLora(), state, [client])
    assert int(update.keep["rank"]["rank"]) == rank
    assert update.metrics["own_rank"] == rank
    assert {n: t.shape for n, t in update.payload["factors"].items()} == {
        n: t.shape for n, t in start.items()
    }
    assert update.payload.keys() == {"factors", "head"}


def test_a_pruned_client_starts_from_and_sends_zeros_in_the_tail() -> None:
    state = {"global": tiny.pair(4, 3), "head": {}}
    kept = {"rank": {"rank": torch.tensor(3)}}
    client = tiny.Scripted({}, 1, SPEC, kept=kept)
    (update,) = tiny.scripted(HetLora(), state, [client])
    (asked,) = client.asked
    for params in (asked["start"], update.payload["factors"]):
        assert not params["m.lora_A"][3:].any()
        assert not params["m.lora_B"][:, 3:].any()
        assert bool(params["m.lora_A"][:3].all())
    gradients = {n: torch.ones_like(t) for n, t in asked["start"].items()}
    pulled = asked["correct"](gradients, asked["start"])  # of rank 3, the tail is row 2
    assert torch.equal(pulled["m.lora_A"][3:], gradients["m.lora_A"][3:])
    assert bool(torch.isfinite(pulled["m.lora_A"]).all())


def test_the_penalty_is_the_gradient_of_the_norms_by_autograd() -> None:
    penalty = 0.25
    state = {"global": tiny.pair(4, 3), "head": {"bias": torch.tensor([1.0])}}
    client = tiny.Scripted({}, 1, SPEC)
    (update,) = tiny.scripted(HetLora(penalty=penalty, keep=0.5), state, [client])
    assert int(update.keep["rank"]["rank"]) == 4  # a tail that has not moved has not fallen
    weights = {n: t.double().requires_grad_() for n, t in tiny.pair(4, 9).items()}
    loss = penalty * weights["m.lora_A"][2:].norm() * weights["m.lora_B"][:, 2:].norm()
    loss.backward()
    gradients = {**tiny.pair(4, 5), "bias": torch.tensor([3.0])}
    plain = {n: t.detach().float() for n, t in weights.items()}
    found = client.asked[0]["correct"](gradients, plain)
    for name, weight in weights.items():
        grad = weight.grad
        assert isinstance(grad, Tensor)
        assert torch.allclose(found[name], gradients[name] + grad.float(), rtol=1e-5, atol=1e-6)
    assert found["bias"].tolist() == [3.0]


def test_without_penalty_nothing_is_pulled_and_nothing_pruned() -> None:
    state = {"global": tiny.pair(4, 3), "head": {}}
    start = {n: t / SPEC.scaling**0.5 for n, t in state["global"].items()}
    client = tiny.Scripted(shrunk(start, 0.5), 1, SPEC)
    (update,) = tiny.scripted(PLAIN, state, [client])
    assert client.asked[0]["correct"] is None
    assert int(update.keep["rank"]["rank"]) == 4


def test_rank_one_is_never_pruned() -> None:
    state = {"global": tiny.pair(1, 3), "head": {}}
    start = {n: t / 2 for n, t in state["global"].items()}
    (update,) = tiny.scripted(HetLora(), state, [tiny.Scripted(start, 1, LoraSpec(1, 1.0))])
    assert int(update.keep["rank"]["rank"]) == 1


def test_costs_the_bytes_of_each_clients_rank() -> None:
    sizes = [Size(A=3, B=5, head=2), Size(A=6, B=10, head=2)]
    assert PLAIN.cost(sizes) == [Cost(up=40, down=40), Cost(up=72, down=72)]


@pytest.mark.parametrize("options", [{"penalty": -1.0}, {"keep": 0.0}, {"keep": 1.0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs penalty >= 0 and 0 < keep < 1"):
        HetLora(**options)  # type: ignore[arg-type]
