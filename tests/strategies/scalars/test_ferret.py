import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla import seeds
from corolla.directions import moving, seedlog, signs
from corolla.strategies.scalars.ferret import Ferret
from corolla.tensors import tree
from corolla.types import Cost, Params, Payload, Size
from tests.strategies import devices, tiny


def start(count: int) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": 0.1 * torch.randn(count // 2, generator=generator),
        "b": 0.1 * torch.randn(count - count // 2, generator=generator),
    }


def change(count: int, seed: int) -> Tensor:
    """Of many magnitudes, as updates are."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator, dtype=torch.float64)
    return drawn * torch.rand(count, generator=generator, dtype=torch.float64) ** 3


def after(first: Params, moved: Tensor) -> Params:
    names = sorted(first)
    pieces = torch.split(moved, [first[n].numel() for n in names])
    return {n: (first[n] + d).float() for n, d in zip(names, pieces, strict=True)}


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].double().reshape(-1) for n in sorted(params)])


def settled(strategy: Ferret, state: Payload) -> Tensor:
    whole = strategy.adapter(state)
    return flat(moving.settle(whole.trained, whole.moves))


def reconstruction(size: int, moved: Tensor, seed: int, server_lr: float = 1.0) -> Tensor:
    """What a round with one client, whose training moved it by `moved`, does to the model."""
    strategy = Ferret(size=size, server_lr=server_lr)
    zero = {"a": torch.zeros(len(moved))}
    first = strategy.init(zero, seed)
    member = tiny.Scripted(after(zero, moved), 5)
    return settled(strategy, tiny.play(strategy, first, [member], first))


@pytest.mark.parametrize(("count", "size"), [(2000, 256), (2000, 1024), (3000, 64)])
def test_the_reconstruction_is_the_update_on_average(count: int, size: int) -> None:
    """⟨rec, Δ⟩ / |Δ|² is 1 within 4 · sqrt(2 / size) for each seed, and closer for their mean."""
    slopes = []
    for seed in range(12):
        moved = change(count, seed)
        found = reconstruction(size, moved, seed)
        slopes.append(float(found @ moved / moved.square().sum()))
        assert abs(slopes[-1] - 1) < 4 * math.sqrt(2 / size)
    assert abs(sum(slopes) / 12 - 1) < 4 * math.sqrt(2 / size / 12)


@pytest.mark.parametrize(("count", "size"), [(2048, 256), (2048, 1024), (4096, 64)])
def test_the_relative_error_is_that_of_the_dimension(count: int, size: int) -> None:
    """About sqrt(d / size - 1)."""
    errors = []
    for seed in range(8):
        moved = change(count, seed)
        errors.append(float((reconstruction(size, moved, seed) - moved).norm() / moved.norm()))
    wanted = math.sqrt(count / size - 1)
    assert sum(errors) / 8 == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("count", "size"), [(1000, 1024), (64, 64), (5, 4096)])
def test_with_as_many_directions_as_values_it_is_exact(count: int, size: int) -> None:
    moved = change(count, 1).float().double()
    found = reconstruction(size, moved, 1)
    assert float((found - moved).norm() / moved.norm()) < 1e-6


def test_projections_are_linear_in_the_update() -> None:
    strategy = Ferret(size=64)
    zero = {"a": torch.zeros(500)}
    first = strategy.init(zero, 0)
    received = tiny.seen(strategy.broadcast(first), first)

    def gamma(moved: Tensor) -> Tensor:
        update = strategy.local(tiny.Scripted(after(zero, moved), 5), received)
        return update.payload["projections"]["scalars"].double()

    one, other = (change(500, s).float().double() for s in (1, 2))
    both = gamma(2 * one - 0.5 * other)
    assert both == pytest.approx(2 * gamma(one) - 0.5 * gamma(other), abs=1e-6)


def test_projections_are_dense_products() -> None:
    """γ_k = ⟨z_k, Δ⟩ / size with directions from their definition, on the flat vector by name."""
    strategy = Ferret(size=16)
    first_params = start(70)
    first = strategy.init(first_params, 9)
    moved = change(70, 3)
    member = tiny.Scripted(after(first_params, moved), 5)
    update = strategy.local(member, tiny.seen(strategy.broadcast(first), first))
    signed = torch.from_numpy(signs.signs((seeds.derive(9, "directions"), 1), 0, 70)).double()
    exact = flat(after(first_params, moved)) - flat(first_params)
    for k, found in enumerate(update.payload["projections"]["scalars"].tolist()):
        row = torch.tensor([(-1) ** (k & i).bit_count() for i in range(70)])
        assert found == pytest.approx(float(exact @ (signed * row)) / 16, abs=1e-6)


def test_projections_are_averaged_by_examples() -> None:
    """As many directions as values: the mean of the clients' weights, exactly."""
    strategy = Ferret(size=128)
    first_params = start(100)
    first = strategy.init(first_params, 4)
    state = first
    for round in (1, 2):
        here = settled(strategy, state)
        moved = [change(100, 10 * round + m) for m in range(2)]
        now = after(first_params, here - flat(first_params))
        members = [tiny.Scripted(after(now, d), n) for d, n in zip(moved, (1, 3), strict=True)]
        state = tiny.play(strategy, state, members, first)
        wanted = here + 0.25 * moved[0] + 0.75 * moved[1]
        assert float((settled(strategy, state) - wanted).norm() / wanted.norm()) < 1e-6
        for member in members:
            assert tiny.same(member.asked[0]["start"], now)
    rows = seedlog.rows(state)
    assert list(rows) == [1, 2]
    assert strategy.adapter(state).moves[0].pool != strategy.adapter(state).moves[1].pool


def test_the_server_rate_scales_the_step() -> None:
    moved = change(300, 1)
    whole = reconstruction(64, moved, 3)
    half = reconstruction(64, moved, 3, server_lr=0.5)
    assert float((half - whole / 2).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("options", [{"size": 100}, {"server_lr": 0.0}, {"server_lr": math.nan}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Ferret(**options)


def test_the_cost_is_one_value_for_each_direction() -> None:
    assert Ferret(size=64).cost([Size(1, 2, 3)]) == [Cost(4 * 64, 4 * 64 + 4, at_most=True)]


# Real rounds


@pytest.mark.parametrize("size", [64, 4096])
def test_all_devices_end_with_the_servers_bits(size: int, tmp_path: Path) -> None:
    """With rows, and where these are more bytes than the weights, with snapshots."""
    run = devices.start("bert", tmp_path, strategy="ferret", options={"size": size}, lr=1e-3)
    before = run.server()
    for members in ("ab", "b", "abc"):
        result = run.step(*members)
        assert result.traffic.up == len(members) * 4 * size == result.cost.up
        assert result.traffic.down <= result.cost.down * (1 if "a" in members else 3) + 20_000
    assert run.hashes() == dict.fromkeys("abcd", run.server())
    assert run.server() != before


def test_enough_directions_are_the_mean_of_what_devices_hold_in_every_round(
    tmp_path: Path,
) -> None:
    """Also after snapshots: all project on the signs of the round that the server is in."""
    run = devices.start("llama", tmp_path, strategy="ferret", options={"size": 8192}, lr=1e-2)
    count = sum(t.numel() for t in run.state["start"].values())
    assert count <= 8192
    for _ in range(3):
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
            "gpt2",
            tmp_path / str(reverse),
            reverse=reverse,
            strategy="ferret",
            options={"size": 64},
            dropout=0.1,
        )
        run.step()
        run.step()
        found.append(tree.digest_all(run.state))
    assert found[0] == found[1]
