import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corolla.directions.pools import GaussianPool, SignPool
from corolla.directions.space import Beside, InPlace
from corolla.types import Pool

EPS = 1e-3
SIGN = SignPool(64, (3, 1))
POOLS = [pytest.param(SIGN, id="sign"), pytest.param(GaussianPool(3), id="gaussian")]


class Counting:
    """A pool that writes down what was asked of it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.calls: list[list[tuple[int, float]]] = []

    def add(
        self,
        out: Tensor,
        offset: int,
        terms: Sequence[tuple[int, float]],
        source: Tensor | None = None,
    ) -> None:
        self.calls.append(list(terms))
        self.pool.add(out, offset, terms, source)


def weights(count: int = 500, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(0))


def direction(pool: Pool, k: int, count: int, offset: int = 0) -> Tensor:
    found = torch.zeros(count)
    pool.add(found, offset, [(k, 1.0)])
    return found.double()


def parts(flat: Tensor, offset: int = 0) -> list[tuple[int, Tensor]]:
    """A vector in tensors of several shapes, as (offset, tensor): copies."""
    cuts = [0, 1, 65, 200, len(flat)]
    return [(offset + a, flat[a:b].clone().view(-1, 1)) for a, b in itertools.pairwise(cuts)]


def joined(tensors: Sequence[tuple[int, Tensor]]) -> Tensor:
    return torch.cat([tensor.view(-1) for _, tensor in tensors])


# A small vector with its point beside it


@pytest.mark.parametrize("pool", POOLS)
def test_looking_beside_shows_the_point_plus_terms(pool: Pool) -> None:
    start = weights()
    shown = start.clone()
    space = Beside(shown)
    space.look(pool, {5: EPS, 9: -0.25})
    wanted = start.double() + EPS * direction(pool, 5, 500) - 0.25 * direction(pool, 9, 500)
    assert float((shown - wanted).abs().max()) < 1e-7
    assert torch.equal(space.point, start)


@pytest.mark.parametrize("pool", POOLS)
def test_looking_back_beside_restores_every_bit(pool: Pool) -> None:
    start = weights()
    shown = start.clone()
    space = Beside(shown)
    for k in range(50):
        space.look(pool, {k: EPS})
        space.look(pool, {k: -EPS})
    assert not torch.equal(shown, start)
    space.look(pool, {})
    assert torch.equal(shown, start)


@pytest.mark.parametrize("pool", POOLS)
def test_a_move_beside_shows_at_the_next_look(pool: Pool) -> None:
    start = weights()
    shown = start.clone()
    space = Beside(shown)
    space.move(pool, {2: 0.5})
    assert torch.equal(shown, start)
    space.look(pool, {})
    assert torch.equal(shown, space.point)
    assert float((shown - (start + 0.5 * direction(pool, 2, 500))).abs().max()) < 1e-7


def test_what_is_looked_at_beside_leaves_no_trace_in_later_moves() -> None:
    """Bit for bit what a space without any look gives."""
    one, other = Beside(weights()), Beside(weights())
    for k in range(20):
        one.look(SIGN, {k: EPS})
        one.look(SIGN, {k: -EPS})
        for space in (one, other):
            space.move(SIGN, {k: 1e-5 * k})
    assert torch.equal(one.point, other.point)


# All parameters where they are


@pytest.mark.parametrize("pool", POOLS)
def test_looking_in_place_shows_the_point_plus_terms(pool: Pool) -> None:
    start = weights()
    tensors = parts(start, 1000)
    space = InPlace(tensors)
    for terms in ({5: EPS}, {5: -EPS}, {9: 0.25, 5: 1.0}, {5: 1.0}, {}, {1: 0.5}):
        space.look(pool, terms)
        wanted = start.double()
        for k, scale in terms.items():
            wanted = wanted + scale * direction(pool, k, 500, 1000)
        assert float((joined(tensors) - wanted).abs().max()) < 2e-6


def test_a_look_in_place_is_one_pass_and_none_when_nothing_changes() -> None:
    pool = Counting(SIGN)
    space = InPlace([(0, weights())])
    space.look(pool, {})
    assert pool.calls == []
    space.look(pool, {4: EPS})
    space.look(pool, {4: EPS})
    space.look(pool, {4: -EPS})
    space.move(pool, {4: 0.5})
    space.look(pool, {7: EPS})
    space.look(pool, {})
    assert pool.calls == [
        [(4, EPS)],
        [(4, -2 * EPS)],
        [(4, EPS + 0.5), (7, EPS)],
        [(7, -EPS)],
    ]
    space.look(pool, {})
    assert len(pool.calls) == 4


def test_the_same_direction_in_two_steps_is_one_term() -> None:
    pool = Counting(SIGN)
    space = InPlace([(0, weights())])
    space.look(pool, {4: EPS})
    space.move(pool, {4: 0.5})
    space.look(pool, {4: EPS})
    space.move(pool, {4: 0.25})
    space.move(pool, {6: 1.0})
    space.look(pool, {})
    assert pool.calls == [[(4, EPS)], [(4, 0.5)], [(4, 0.25 - EPS), (6, 1.0)]]


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[bool, dict[int, float]]]:
    """Looks (True) and moves, along a few directions."""
    terms = st.dictionaries(st.integers(0, 5), st.sampled_from([EPS, -EPS, 0.5, 1e-4]), max_size=3)
    return draw(st.lists(st.tuples(st.booleans(), terms), max_size=12))


@settings(max_examples=50)
@given(program=programs())
def test_both_spaces_show_the_same(program: list[tuple[bool, dict[int, float]]]) -> None:
    start = weights()
    shown, tensors = start.clone(), parts(start)
    beside, in_place = Beside(shown), InPlace(tensors)
    moved = start.double()
    for look, terms in [*program, (True, {})]:
        for space in (beside, in_place):
            (space.look if look else space.move)(SIGN, terms)
        if look:
            wanted = moved.clone()
            for k, scale in terms.items():
                wanted += scale * direction(SIGN, k, 500)
            assert float((shown - wanted).abs().max()) < 2e-6
            assert float((joined(tensors) - wanted).abs().max()) < 5e-6
        else:
            for k, scale in terms.items():
                moved += scale * direction(SIGN, k, 500)


def test_tensors_in_place_are_slices_of_one_vector() -> None:
    """How the vector is cut into tensors changes no bit."""
    start = weights()
    whole, cut = [(77, start.clone())], parts(start, 77)
    for space in (InPlace(whole), InPlace(cut)):
        for k in range(10):
            space.look(SIGN, {k: EPS})
            space.look(SIGN, {k: -EPS})
            space.move(SIGN, {k: 1e-4})
        space.look(SIGN, {})
    assert torch.equal(joined(whole), joined(cut))


def drift(pool: Pool, dtype: torch.dtype, steps: int = 200, eps: float = EPS) -> float:
    """How far `steps` perturbations and restorations leave weights from where they were."""
    start = weights(20_000, 0.02).to(dtype)
    tensor = start.clone()
    space = InPlace([(0, tensor)])
    for k in range(steps):
        space.look(pool, {k: eps})
        space.look(pool, {k: -eps})
    space.look(pool, {})
    return float((tensor.double() - start.double()).norm() / start.double().norm())


@pytest.mark.parametrize(
    ("pool", "dtype", "most"),
    [
        (SignPool(256, (3, 1)), torch.float32, 3e-6),
        (SignPool(256, (3, 1)), torch.float16, 5e-4),
        (SignPool(256, (3, 1)), torch.bfloat16, 2e-3),
        (GaussianPool(3), torch.float32, 2e-6),
        (GaussianPool(3), torch.float16, 7e-3),
        (GaussianPool(3), torch.bfloat16, 6e-2),
    ],
)
def test_drift_of_restored_weights_is_bounded(pool: Pool, dtype: torch.dtype, most: float) -> None:
    """By rounding alone, after 200 steps, relative to the weights."""
    assert 0 < drift(pool, dtype) < most


def test_perturbations_by_a_power_of_two_do_not_drift() -> None:
    """They are multiples of a weight's last place: only the first one can lose a bit."""
    pool, eps = SignPool(1024, (3, 1)), 2.0**-10
    assert drift(pool, torch.float32, 20, eps) == drift(pool, torch.float32, 600, eps) < 1e-7
