from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla import seeds
from corolla.directions import moving, signs
from corolla.directions.pools import GaussianPool, SignPool
from corolla.strategies.scalars.fedkseed import FedKSeed
from corolla.tensors import tree
from corolla.types import Cost, Params, Payload, Pool, Size
from corolla.wire import messages
from tests.strategies import devices, tiny

KINDS = ["gaussian", "sign"]
START: Params = {
    "m.lora_A": torch.tensor([[0.5, -1.0, 2.0]]),
    "m.lora_B": torch.tensor([[3.0], [0.25]]),
}


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].detach().double().reshape(-1) for n in sorted(params)])


def pool(strategy: FedKSeed, seed: int) -> Pool:
    key = seeds.derive(seed, "directions")
    if strategy.directions == "gaussian":
        return GaussianPool(key)
    return SignPool(strategy.size, (key, 0))


def z(own: Pool, k: int, count: int) -> Tensor:
    found = torch.zeros(count)
    own.add(found, 0, [(k, 1.0)])
    return found.double()


def client(n: int, seed: int, *scalars: float, step: float = -0.25) -> tiny.Scripted:
    return tiny.Scripted({}, n, seed=seed, kind="zeroth_order", scalars=scalars, step=step)


def make(kind: str, size: int = 8) -> FedKSeed:
    options: dict[str, Any] = {"directions": kind}
    return FedKSeed(size=size, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_by_hand(kind: str) -> None:
    """The same directions in all rounds; each client's step, weights by examples."""
    strategy = make(kind)
    first = strategy.init(START, 5)
    own = pool(strategy, 5)
    state, sums = first, torch.zeros(8, dtype=torch.float64)
    for rate in (0.25, 0.0625):  # a rate that falls is in the sums
        members = [
            client(1, 11, 1.0, -2.0, 0.5, step=-rate),
            client(3, 2**32 - 1, 4.0, 0.25, step=-rate / 2),
        ]
        state = tiny.play(strategy, state, members, first)
        for member, p in zip(members, (0.25, 0.75), strict=True):
            chosen = [int(w) % 8 for w in signs.words((member.seed, 0), 0, 3, stream=1)]
            for k, g in zip(chosen, member.scalars, strict=False):
                sums[k] += p * member.step * g
            assert member.asked[0]["directions"] == chosen[: len(member.scalars)]
            assert member.asked[0]["pool"] == own
        assert state["sums"]["scalars"].tolist() == pytest.approx(sums.tolist(), rel=1e-6)
    whole = strategy.adapter(state)
    found = flat(moving.settle(whole.trained, whole.moves))
    wanted = flat(START)
    for k in range(8):
        wanted = wanted + sums[k] * z(own, k, 5)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_clients_name_the_directions_they_took() -> None:
    strategy = make("gaussian", 64)
    first = strategy.init(START, 5)
    member = client(1, 11, 1.0, -2.0, 0.5)
    update = strategy.local(member, tiny.seen(strategy.broadcast(first), first))
    group = update.payload["scalars"]
    assert group.keys() == {"scalars", "step", "directions"}
    assert group["directions"].dtype == torch.int32
    assert group["directions"].tolist() == signs.choices(11, 3, 64).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_state_moves_nothing(kind: str) -> None:
    strategy = make(kind)
    assert strategy.adapter(strategy.init(START, 0)).moves == ()


@pytest.mark.parametrize("options", [{"size": 100}, {"size": 0}, {"directions": "uniform"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FedKSeed(**options)


def test_a_client_and_round_is_less_than_eighteen_kilobytes() -> None:
    """K = 4096 and 200 steps, as in the paper: 8 · 200 + 4 up, 4 · 4096 + 4 down."""
    strategy = FedKSeed()
    scalars = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    first = strategy.init(START, 0)
    received = tiny.seen(strategy.broadcast(first), first)
    state: Payload = first
    for round in range(4):
        members = [client(5, 1000 * round + m, *scalars) for m in range(50)]
        up = {messages.content_bytes(strategy.local(m, received).payload) for m in members}
        assert up == {8 * 200 + 4}
        state = tiny.play(strategy, state, members, first)
    assert bool((state["sums"]["scalars"] != 0).all())
    broadcast = strategy.broadcast(state)
    down = messages.content_bytes(broadcast.payload)
    assert down == 4 * 4096 + 4
    assert 8 * 200 + 4 + down < 18_000
    assert broadcast.log == ()
    assert broadcast.snapshot is None
    (cost,) = strategy.cost([Size(1, 2, 3, 200, "zeroth_order")])
    assert cost == Cost(8 * 200 + 4, 4 * 4096 + 4, at_most=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["lora", "full"])
def test_all_devices_end_with_the_servers_bits(kind: str, space: str, tmp_path: Path) -> None:
    """Also who joins late, or was away: the broadcast has all there is to know."""
    run = devices.start(
        "llama",
        tmp_path,
        strategy="fedkseed",
        parameters=space,
        options={"size": 16, "directions": kind},
        lr=1e-3,
    )
    before = run.server()
    for members in ("ab", "b", "abc"):
        run.step(*members)
    run.network.restart("b")
    assert run.hashes() == dict.fromkeys("abcd", run.server())
    assert run.server() != before


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_recovers_the_sums_from_the_weights(kind: str, tmp_path: Path) -> None:
    """After real rounds everything lies in the span of the directions."""
    run = devices.start(
        "llama",
        tmp_path,
        strategy="fedkseed",
        options={"size": 16, "directions": kind},
        lr=0.05,
        local_steps=8,
    )
    start = flat(devices.weights(run.shown()))
    for _ in range(2):
        run.step()
    change = flat(devices.weights(run.shown())) - start
    strategy = run.federation.strategy
    assert isinstance(strategy, FedKSeed)
    own = pool(strategy, run.federation.config.seed)
    matrix = torch.stack([z(own, k, len(start)) for k in range(16)]).T
    found, *_ = np.linalg.lstsq(matrix.numpy(), change.numpy(), rcond=None)
    wanted = run.state["sums"]["scalars"].double().numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6
    assert np.linalg.norm(change.numpy() - matrix.numpy() @ found) < 1e-5 * float(change.norm())


@pytest.mark.parametrize("space", ["lora", "full"])
def test_the_global_model_is_the_mean_of_what_devices_hold(space: str, tmp_path: Path) -> None:
    run = devices.start(
        "llama",
        tmp_path,
        strategy="fedkseed",
        parameters=space,
        options={"size": 16, "directions": "sign"},
        lr=1e-3,
    )
    for _ in range(2):
        result = run.step()
        own = {c: flat(held) for c, held in run.network.weights.items()}
        total = sum(result.num_examples.values())
        mean = torch.stack([n / total * own[c] for c, n in result.num_examples.items()]).sum(0)
        off = flat(devices.weights(run.shown())) - mean
        assert float(off.norm() / mean.norm()) < 1e-6


def test_the_order_of_clients_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for reverse in (False, True):
        run = devices.start(
            "bert",
            tmp_path / str(reverse),
            reverse=reverse,
            strategy="fedkseed",
            options={"size": 16},
            lr=1e-3,
        )
        run.step()
        run.step()
        found.append((tree.digest_all(run.state), run.server()))
    assert found[0] == found[1]


def test_bytes_are_the_formula_once_all_directions_were_used(tmp_path: Path) -> None:
    run = devices.start(
        "llama", tmp_path, strategy="fedkseed", options={"size": 8}, local_steps=6, lr=1e-4
    )
    down = []
    for _ in range(3):
        result = run.step()
        assert result.metrics["zero_scalars"] == 0
        assert result.traffic.up == 4 * (8 * 6 + 4)
        down.append(result.traffic.down)
    assert down[0] < 4 * (4 * 8 + 4)  # nothing but zeros
    assert down[2] == 4 * (4 * 8 + 4)
