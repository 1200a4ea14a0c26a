import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corolla.directions import moving, signs
from corolla.directions.pools import GaussianPool, SignPool
from corolla.types import Move, Params, Pool

BLOCK = 1 << 16  # of Gaussian values
SIGN = SignPool(32, (7, 3))
GAUSSIAN = GaussianPool(7)
POOLS = [pytest.param(SIGN, id="sign"), pytest.param(GAUSSIAN, id="gaussian")]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def direction(pool: Pool, k: int, count: int, offset: int = 0) -> Tensor:
    """z_k[offset : offset + count], as what one step of scale 1 adds to nothing."""
    found = torch.zeros(count)
    pool.add(found, offset, [(k, 1.0)])
    return found


def matrix(pool: Pool, size: int, count: int) -> np.ndarray:
    """The first `size` directions as rows, in fp64."""
    return np.stack([direction(pool, k, count).double().numpy() for k in range(size)])


def random_tensor(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def ulp(x: Tensor) -> Tensor:
    """The distance to the next number of the same type."""
    up = torch.nextafter(x.abs(), torch.full_like(x, torch.inf))
    return (up - x.abs()).double()


# Directions


def test_a_sign_direction_is_the_signs_times_a_row_of_the_hadamard_matrix() -> None:
    signed = signs.signs(SIGN.key, 0, 100)
    for k in range(SIGN.size):
        row = [(-1) ** (k & i).bit_count() for i in range(100)]
        assert direction(SIGN, k, 100).tolist() == (signed * row).tolist()


def test_a_gaussian_direction_is_the_ziggurat_of_numpy_on_its_own_counter() -> None:
    for k, block in ((0, 0), (5, 0), (5, 2)):
        philox = np.random.Philox(
            key=np.array([7, k], dtype=np.uint64),
            counter=np.array([0, block, 2, 0], dtype=np.uint64),
        )
        wanted = np.random.Generator(philox).standard_normal(BLOCK, dtype=np.float32)[:500]
        found = GAUSSIAN.values(k, block * BLOCK, block * BLOCK + 500)
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("pool", POOLS)
@settings(max_examples=25)
@given(
    k=st.integers(0, 31),
    cuts=st.lists(
        st.one_of(
            st.integers(0, 2 * BLOCK + 300),
            st.sampled_from([1, 31, 32, 33, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_slices_of_a_direction_are_slices_of_the_whole(pool: Pool, k: int, cuts: list[int]) -> None:
    end = 2 * BLOCK + 300
    whole = direction(pool, k, end)
    for start, stop in itertools.pairwise(sorted({0, *cuts, end})):
        assert torch.equal(direction(pool, k, stop - start, start), whole[start:stop])


@pytest.mark.parametrize("start", [0, 5, BLOCK - 3, BLOCK, 3 * BLOCK - 1])
@pytest.mark.parametrize("count", [1, 2, 17, BLOCK + 1])
def test_gaussian_values_are_slices_across_blocks(start: int, count: int) -> None:
    whole = torch.cat([GAUSSIAN.values(9, i, i + 1) for i in range(start, start + min(count, 5))])
    assert torch.equal(GAUSSIAN.values(9, start, start + count)[:5], whole)


def test_no_gaussian_value_is_drawn_that_is_not_needed_or_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the last block only a prefix, and in long tensors each block once."""
    own, drawn = GaussianPool._block, []

    def spy(pool: GaussianPool, k: int, block: int, count: int) -> Any:
        drawn.append((block, count))
        return own(pool, k, block, count)

    monkeypatch.setattr(GaussianPool, "_block", spy)
    GAUSSIAN.values(3, 10, 14)
    GAUSSIAN.values(3, BLOCK - 1, BLOCK + 5)
    GAUSSIAN.values(3, BLOCK, 2 * BLOCK)
    assert drawn == [(0, 14), (0, BLOCK), (1, 5), (1, BLOCK)]
    move = Move(GAUSSIAN, torch.eye(8)[3])
    changes: list[Callable[[Tensor], None]] = [
        lambda out: GAUSSIAN.add(out, BLOCK - 7, [(3, 1.0)]),
        lambda out: moving.apply(out, BLOCK - 7, [move]),
    ]
    for change in changes:
        drawn.clear()
        change(torch.zeros(2 * BLOCK))
        assert drawn == [(0, BLOCK), (1, BLOCK), (2, BLOCK - 7)]


def test_other_seeds_rounds_and_numbers_are_other_directions() -> None:
    count = 4096
    signed = [SignPool(64, (seed, round)) for seed in (1, 2**32) for round in (0, 1)]
    found = [
        *(direction(pool, k, count) for pool in signed for k in (0, 1, 63)),
        *(direction(GaussianPool(s), k, count) for s in (1, 2, 2**32 - 1) for k in (0, 1, 4095)),
        *(GaussianPool(1).values(k, BLOCK, BLOCK + count) for k in (0, 1)),
    ]
    for one, other in itertools.combinations(found, 2):
        assert abs(float(one @ other)) / count < 5 / count**0.5


@pytest.mark.parametrize("pool", POOLS)
def test_directions_have_the_moments_of_a_white_vector(pool: Pool) -> None:
    count = 40_000
    z = direction(pool, 3, count).double()
    assert abs(float(z.mean())) < 4 / count**0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / count**0.5


def test_gaussian_values_are_normal() -> None:
    z = GAUSSIAN.values(1, 0, 60_000).double()
    wanted = torch.special.ndtri(torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64))
    for limit, chance in zip(wanted, (0.001, 0.1, 0.5, 0.9, 0.999), strict=True):
        assert float((z < limit).double().mean()) == pytest.approx(
            chance, abs=4 * (chance * (1 - chance) / 60_000) ** 0.5
        )


@pytest.mark.parametrize("pool", POOLS)
def test_global_random_states_are_neither_read_nor_moved(pool: Pool) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        found.append(direction(pool, 4, 1000))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert torch.equal(*found)


# Steps along a few of them


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("offset", [0, 70, BLOCK - 10])
def test_terms_are_added_one_after_the_other(pool: Pool, offset: int) -> None:
    terms = [(3, 0.25), (17, -1e-3), (3, 1.5)]
    start = random_tensor(200, 0)
    wanted = start.numpy().copy()
    for k, scale in terms:
        wanted = wanted + np.float32(scale) * direction(pool, k, 200, offset).numpy()
    found = start.clone()
    pool.add(found, offset, terms)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("pool", POOLS)
def test_a_source_is_read_and_left_alone(pool: Pool) -> None:
    source = random_tensor(300, 1)
    before, found = source.clone(), torch.full((300,), torch.nan)
    pool.add(found, 5, [(2, 0.5)], source=source)
    assert torch.equal(source, before)
    pool.add(before, 5, [(2, 0.5)])
    assert torch.equal(found, before)
    pool.add(found, 5, [], source=source)
    assert torch.equal(found, source)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(pool: Pool, dtype: torch.dtype) -> None:
    start = random_tensor(2000, 2).to(dtype)
    found = start.clone()
    terms = [(k, 1e-3) for k in range(20)]
    pool.add(found, 0, terms)
    wide = start.float()
    pool.add(wide, 0, terms)
    assert torch.equal(found, wide.to(dtype))
    each = start.clone()
    for term in terms:
        pool.add(each, 0, [term])
    assert not torch.equal(found, each)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [1e-4, 0.03, 2.0])
def test_a_step_and_its_opposite_restore_within_one_unit_in_the_last_place(
    pool: Pool, dtype: torch.dtype, g: float
) -> None:
    start = random_tensor(3000, 3, 0.1).to(dtype)
    found = start.clone()
    pool.add(found, 0, [(6, g)])
    far = torch.maximum(ulp(found), ulp(start))
    pool.add(found, 0, [(6, -g)])
    assert bool(((found.double() - start.double()).abs() <= far).all())


# Moves along all of them


def scalars(size: int, seed: int, scale: float = 1.0) -> Tensor:
    return random_tensor(size, seed, scale)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("step", [1.0, -3e-4])
@pytest.mark.parametrize("offset", [0, 40, BLOCK - 100])
def test_a_move_is_the_dense_sum_of_its_directions(pool: Pool, step: float, offset: int) -> None:
    g, start = scalars(32, 4), random_tensor(500, 5, 0.1)
    wanted = start.double()
    for k in range(32):
        wanted = wanted + step * float(g[k]) * direction(pool, k, 500, offset).double()
    found = start.clone()
    moving.apply(found, offset, [Move(pool, g, step)])
    assert float((found - wanted).norm() / wanted.norm()) < 2e-7
    moved, ideal = found.double() - start, wanted - start
    assert float((moved - ideal).norm() / ideal.norm()) < max(1e-6, 1e-7 / abs(step) / 10)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rows", [1, 3])
def test_least_squares_recovers_the_scalars_from_the_weights(pool: Pool, rows: int) -> None:
    """Everything moves in the span of the directions: w_t - w_0 = Σ_k G_k z_k."""
    start = {"b": random_tensor(300, 6, 0.1).view(20, 15), "a": random_tensor(123, 7, 0.1)}
    drawn = [scalars(32, 10 + row) for row in range(rows)]
    after = moving.settle(start, [Move(pool, g) for g in drawn])
    change = torch.cat([(after[n].double() - start[n].double()).reshape(-1) for n in ("a", "b")])
    z = matrix(pool, 32, 423).T
    found, *_ = np.linalg.lstsq(z, change.numpy(), rcond=None)
    wanted = torch.stack(drawn).double().sum(0).numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6
    left = np.linalg.norm(change.numpy() - z @ found) / float(change.norm())
    assert left < 1e-6


@pytest.mark.parametrize("pool", POOLS)
def test_moves_one_by_one_and_all_at_once_have_the_same_bits(pool: Pool) -> None:
    other: Pool = SignPool(8, (1, 9)) if isinstance(pool, SignPool) else GaussianPool(8)
    moves = [
        Move(pool, scalars(32, 8), 1e-3),
        Move(other, scalars(8, 9)),
        Move(pool, scalars(32, 1)),
    ]
    start = random_tensor(BLOCK + 500, 10)
    at_once, in_turn, halves = start.clone(), start.clone(), start.clone()
    moving.apply(at_once, 3, moves)
    for move in moves:
        moving.apply(in_turn, 3, [move])
    for low, high in ((0, 77), (77, BLOCK), (BLOCK, BLOCK + 500)):
        moving.apply(halves[low:high], 3 + low, moves, start[low:high])
    assert torch.equal(at_once, in_turn)
    assert torch.equal(at_once, halves)


def test_pools_of_both_kinds_can_be_mixed() -> None:
    moves = [Move(SIGN, scalars(32, 8)), Move(GAUSSIAN, scalars(32, 9)), Move(SIGN, scalars(32, 1))]
    start = random_tensor(500, 10)
    at_once, in_turn = start.clone(), start.clone()
    moving.apply(at_once, 3, moves)
    for move in moves:
        moving.apply(in_turn, 3, [move])
    assert torch.equal(at_once, in_turn)


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_weights_keep_an_accumulated_move(pool: Pool) -> None:
    """Learning rate 3e-7, g ~ N(0, 30): added scalar by scalar, bfloat16 would lose most of it."""
    start = random_tensor(20_000, 11, 0.02).bfloat16()
    g = scalars(32, 12, 30.0) * 3e-7 * 200
    z = matrix(pool, 32, 20_000)
    ideal = start.double() + torch.from_numpy((g.double().numpy()[:, None] * z).sum(0))
    found = start.clone()
    moving.apply(found, 0, [Move(pool, g)])
    off = (found.double() - ideal).abs()
    half = ulp(found.float().bfloat16()) / 2
    assert bool((off <= half * 1.01).all())  # the nearest bfloat16, except next to ties
    each = start.clone()
    for k in range(32):
        pool.add(each, 0, [(k, float(g[k]))])
    assert float((each.double() - ideal).norm()) > 2 * float((found.double() - ideal).norm())


def test_rounds_accumulate_in_single_precision_and_round_once() -> None:
    start = random_tensor(20_000, 13, 0.02).bfloat16()
    moves = [Move(SignPool(32, (1, r)), scalars(32, r), 1e-5) for r in range(1, 41)]
    once, each = start.clone(), start.clone()
    moving.apply(once, 0, moves)
    wide = start.float()
    for move in moves:
        moving.apply(wide, 0, [move])
        moving.apply(each, 0, [move])
    assert torch.equal(once, wide.bfloat16())
    ideal = start.double()
    for move in moves:
        for k in range(32):
            ideal += 1e-5 * float(move.scalars[k]) * direction(move.pool, k, 20_000).double()
    off = [float((w.double() - ideal).norm() / (ideal - start).norm()) for w in (once, each)]
    assert off[0] < 0.2
    assert off[1] > 3 * off[0]  # rounded each time, small steps are lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype, threads: None) -> None:
    start = random_tensor((1 << 20) + 999, 14).to(dtype)
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        out = start.clone()
        moving.apply(out, 12345, [Move(SignPool(512, (1, 2)), scalars(512, 3, 1e-2))])
        GAUSSIAN.add(out, 99, [(3, 0.1)])
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.parametrize("pool", POOLS)
def test_no_move_is_a_copy(pool: Pool) -> None:
    start = random_tensor(100, 15)
    found = torch.zeros(100)
    moving.apply(found, 0, [], start)
    assert torch.equal(found, start)
    moving.apply(found, 0, [Move(pool, torch.zeros(32))], start)
    assert torch.equal(found, start)


@pytest.mark.parametrize("pools", [[SIGN, SIGN], [GAUSSIAN], [SIGN, GAUSSIAN, SIGN]])
def test_prepared_moves_are_applied_to_many_tensors(
    pools: list[Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as `apply`; the sums of signs are transformed once."""
    moves = [Move(pool, scalars(32, n), 1e-3) for n, pool in enumerate(pools)]
    own, calls = signs.fwht, []

    def spy(values: Any) -> Any:
        calls.append(len(values))
        return own(values)

    starts = [random_tensor(700, n) for n in range(3)]
    wanted = [start.clone() for start in starts]
    for at, tensor in enumerate(wanted):
        moving.apply(tensor, 50 * at, moves)
    monkeypatch.setattr(signs, "fwht", spy)
    change = moving.prepared(moves)
    assert calls == [32] * pools.count(SIGN)
    for at, start in enumerate(starts):
        found = torch.full_like(start, torch.nan)
        change(found, 50 * at, start)
        assert torch.equal(found, wanted[at])
    assert calls == [32] * pools.count(SIGN)


def test_scalars_may_be_of_half_precision() -> None:
    g = scalars(32, 16).half()
    start = random_tensor(100, 17)
    found = [start.clone(), start.clone()]
    moving.apply(found[0], 0, [Move(SIGN, g, 2.0**-20)])
    moving.apply(found[1], 0, [Move(SIGN, g.double(), 2.0**-20)])
    assert torch.equal(*found)


# Trees of tensors


def some_params() -> Params:
    return {
        "b.x": random_tensor(6, 1).view(2, 3),
        "a": random_tensor(4, 2),
        "b": random_tensor(1, 3).view(()),
        "B": random_tensor(5, 4).view(5, 1),
    }


def test_the_flat_vector_is_sorted_by_name_and_row_major() -> None:
    params = some_params()
    flat, layout = moving.flatten(params)
    wanted = [x for name in ("B", "a", "b", "b.x") for x in params[name].reshape(-1).tolist()]
    assert flat.tolist() == wanted
    back = moving.unflatten(flat, layout)
    assert list(back) == ["B", "a", "b", "b.x"]
    assert all(torch.equal(back[n], params[n]) for n in params)
    back["a"][0] = 9.0
    assert float(flat[5]) == 9.0  # views
    assert float(params["a"][0]) != 9.0


def test_settling_depends_on_names_not_on_the_order_of_a_dict() -> None:
    params = some_params()
    before = {n: t.clone() for n, t in params.items()}
    moves = [Move(SIGN, scalars(32, 3)), Move(GAUSSIAN, scalars(32, 4))]
    found = moving.settle(params, moves)
    other = moving.settle(dict(reversed(list(params.items()))), moves)
    flat, _ = moving.flatten(params)
    moving.apply(flat, 0, moves)
    assert torch.equal(moving.flatten(found)[0], flat)
    assert all(torch.equal(found[n], other[n]) for n in params)
    assert all(torch.equal(before[n], params[n]) for n in params)


def test_half_precision_params_settle_in_single_precision() -> None:
    params = {"a": random_tensor(10, 2).bfloat16()}
    assert moving.settle(params, [Move(SIGN, scalars(32, 1))])["a"].dtype == torch.float32


def test_a_fingerprint_tells_moves_apart() -> None:
    g = scalars(32, 1)
    variants: Sequence[Sequence[Move]] = [
        (),
        [Move(SIGN, g)],
        [Move(SIGN, g, 2.0)],
        [Move(SIGN, g.double())],
        [Move(SIGN, g + 1)],
        [Move(SignPool(32, (7, 4)), g)],
        [Move(SignPool(64, (7, 3)), g)],
        [Move(GAUSSIAN, g)],
        [Move(GaussianPool(8), g)],
        [Move(SIGN, g), Move(SIGN, g)],
        [Move(SIGN, g), Move(GAUSSIAN, g)],
        [Move(GAUSSIAN, g), Move(SIGN, g)],
    ]
    found = [moving.fingerprint(moves) for moves in variants]
    assert len(set(found)) == len(variants)
    assert moving.fingerprint([Move(SignPool(32, (7, 3)), g.clone(), 1.0)]) == found[1]


@pytest.mark.parametrize("size", [0, -2, 3, 1000, 1 << 17, 4.0, True, "512", None])
def test_sizes_that_are_no_power_of_two_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="power of two up to 65536"):
        SignPool(size, (0, 0))


@pytest.mark.parametrize("size", [1, 2, 512, 65536])
def test_powers_of_two_are_sizes(size: int) -> None:
    found = direction(SignPool(size, (0, 0)), size - 1, 100)
    assert found.abs().tolist() == [1.0] * 100
