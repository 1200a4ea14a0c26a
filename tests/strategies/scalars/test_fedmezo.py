from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.directions import signs
from corolla.directions.pools import GaussianPool, LowRankPool, SignPool
from corolla.strategies.scalars.fedmezo import FedMeZO
from corolla.tensors import tree
from corolla.types import Cost, Params, Payload, Pool, Size
from tests.strategies import devices, tiny

START: Params = {
    "m.lora_A": torch.tensor([[0.5, -1.0, 2.0]]),
    "m.lora_B": torch.tensor([[3.0], [0.25]]),
}
KINDS = ["gaussian", "sign", "low_rank"]


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].detach().double().reshape(-1) for n in sorted(params)])


def z(pool: Pool, k: int, count: int) -> Tensor:
    found = torch.zeros(count)
    pool.add(found, 0, [(k, 1.0)])
    return found.double()


def make(kind: str) -> FedMeZO:
    options: dict[str, Any] = {"directions": kind}
    return FedMeZO(**options)


def test_adapters_are_averaged_by_examples() -> None:
    strategy = FedMeZO()
    state: Payload = strategy.init(START, 0)
    one = {n: t + 1 for n, t in START.items()}
    other = {n: t - 3 for n, t in START.items()}
    members = [
        tiny.Scripted(one, 1, kind="zeroth_order"),
        tiny.Scripted(other, 3, kind="zeroth_order"),
    ]
    after = tiny.play(strategy, state, members)
    assert tiny.same(after["adapter"], {n: t + 0.25 - 2.25 for n, t in START.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_every_query_of_every_client_has_a_direction_of_its_own(kind: str) -> None:
    strategy = make(kind)
    state = strategy.init(START, 0)
    pools = []
    for seed in (3, 4):
        member = tiny.Scripted(START, 1, seed=seed, kind="zeroth_order", scalars=[1.0] * 60)
        strategy.local(member, tiny.seen(strategy.broadcast(state), state))
        (asked,) = member.asked
        assert list(asked["directions"]) == list(range(60))
        assert asked["moves"] == ()
        pools.append(asked["pool"])
    kinds = {"gaussian": GaussianPool, "sign": SignPool, "low_rank": LowRankPool}
    assert all(isinstance(pool, kinds[kind]) for pool in pools)
    drawn = {tuple(z(pool, k, 5).tolist()) for pool in pools for k in range(60)}
    # Five signs have 32 patterns; as whole vectors of a larger model all differ.
    assert len(drawn) == 120 or kind == "sign"


@pytest.mark.parametrize("kind", KINDS)
def test_clients_move_along_their_directions_alone(kind: str, tmp_path: Path) -> None:
    """What a client sends is Σ step g z, one direction at a time."""
    run = devices.start(
        "llama",
        tmp_path,
        strategy="fedmezo",
        options={"directions": kind},
        lr=1e-3,
        local_steps=4,
        queries=2,
    )
    start = flat(run.state["adapter"])
    pools: list[Pool] = []
    own = FedMeZO._pool

    def spy(self: FedMeZO, seed: int, params: Params) -> Pool:
        pools.append(own(self, seed, params))
        return pools[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedMeZO, "_pool", spy)
        run.step("a")
    change = flat(run.state["adapter"]) - start
    matrix = torch.stack([z(pools[0], k, len(start)) for k in range(8)]).T
    found = torch.linalg.lstsq(matrix, change[:, None]).solution
    assert float((matrix @ found - change[:, None]).norm() / change.norm()) < 1e-4
    assert bool((found != 0).all())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_global_adapter_is_the_mean_of_what_devices_hold(kind: str, tmp_path: Path) -> None:
    run = devices.start(kind, tmp_path, strategy="fedmezo", lr=1e-3)
    for _ in range(2):
        result = run.step()
        own = {c: flat(held) for c, held in run.network.weights.items()}
        total = sum(result.num_examples.values())
        mean = torch.stack([n / total * own[c] for c, n in result.num_examples.items()]).sum(0)
        assert float((flat(run.state["adapter"]) - mean).norm() / mean.norm()) < 1e-7
        values = len(mean)
        assert result.traffic.up == result.traffic.down == result.cost.up == 4 * 4 * values
    assert run.hashes() == dict.fromkeys("abcd", run.server())


def test_the_order_of_clients_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for reverse in (False, True):
        run = devices.start("llama", tmp_path / str(reverse), reverse=reverse, strategy="fedmezo")
        run.step()
        found.append(tree.digest_all(run.state))
    assert found[0] == found[1]


def test_the_cost_is_the_whole_adapter_both_ways() -> None:
    assert FedMeZO().cost([Size(10, 20, 3, 7, "zeroth_order")]) == [Cost(4 * 33, 4 * 33)]


@pytest.mark.parametrize("options", [{"directions": "ones"}, {"lozo_rank": 0}, {"interval": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FedMeZO(**options)


# Low-rank directions


SHAPES = ((6, 5), (7,), (4, 3), ())
WIDTH = 30 + 7 + 12 + 1


def parts(flat_values: Tensor) -> list[Tensor]:
    return list(torch.split(flat_values, [30, 7, 12, 1]))


def test_low_rank_directions_are_of_low_rank_on_matrices_and_full_on_vectors() -> None:
    pool = LowRankPool(3, SHAPES, 2, 4)
    for k in range(6):
        matrix, vector, other, _ = parts(pool.values(k))
        assert torch.linalg.matrix_rank(matrix.view(6, 5)) == 2
        assert torch.linalg.matrix_rank(other.view(4, 3)) == 2
        assert len(set(vector.tolist())) == 7


def test_the_right_factor_stays_for_an_interval() -> None:
    """Directions of one interval share a row space; the next has another."""
    pool = LowRankPool(3, SHAPES, 2, 4)

    def space(ks: list[int]) -> int:
        rows = torch.cat([parts(pool.values(k))[0].view(6, 5) for k in ks])
        return int(torch.linalg.matrix_rank(rows.double(), rtol=1e-5))

    assert space([0, 1, 2, 3]) == 2
    assert space([4, 5, 7]) == 2
    assert space([3, 4]) == 4


def test_low_rank_directions_are_white_on_average() -> None:
    """E[z zᵀ] = I."""
    pool = LowRankPool(3, ((3, 2), (2,)), 2, 1)
    drawn = torch.stack([pool.values(k) for k in range(4000)]).double()
    moments = drawn.T @ drawn / 4000
    assert float((moments - torch.eye(8)).abs().max()) < 0.15


def test_low_rank_directions_depend_on_their_number_alone() -> None:
    pool = LowRankPool(3, SHAPES, 2, 4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    forth = [pool.values(k) for k in range(8)]
    back = [LowRankPool(3, SHAPES, 2, 4).values(k) for k in reversed(range(8))]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))
    assert not torch.equal(LowRankPool(4, SHAPES, 2, 4).values(0), forth[0])


def test_low_rank_directions_are_added_to_the_whole_vector_only() -> None:
    pool = LowRankPool(3, SHAPES, 2, 4)
    source = torch.ones(WIDTH)
    out = torch.zeros(WIDTH)
    pool.add(out, 0, [(1, 0.5), (2, -1.0)], source=source)
    assert out.tolist() == pytest.approx((1 + 0.5 * pool.values(1) - pool.values(2)).tolist())
    assert torch.equal(source, torch.ones(WIDTH))
    for bad, offset in ((out[:30], 0), (out, 3)):
        with pytest.raises(ValueError, match="no slice"):
            pool.add(bad, offset, [(1, 0.5)])


def test_seeds_of_clients_fit_the_pools() -> None:
    """A seed of 32 bits, at its largest."""
    for kind in KINDS:
        pool = make(kind)._pool(2**32 - 1, START)
        assert bool(z(pool, 60_000, 5).isfinite().all())
    assert signs.MAX_POOL == 1 << 16
