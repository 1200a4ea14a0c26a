"""Quantised updates: no bias, no wrap, and sums within what the quantiser states."""

import math
import struct

import numpy as np
import pytest

from corolla.errors import SecureSumError
from corolla.sums.quantise import (
    LEVELS,
    Contribution,
    Quantiser,
    decode,
    quantise,
    rounding,
)


def signed(vector: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> list[int]:
    return vector.view(np.int32).tolist()


def test_a_vector_by_hand() -> None:
    """Half of the largest weight, R = 2: 1.0 is a quarter of all levels; slots follow."""
    quantiser, zeros = Quantiser(2.0, 4, 2), np.zeros(6, np.uint32)
    update = Contribution(np.array([1.0, -1.0]), 2, 4.0)
    found = signed(quantise(quantiser, update, zeros))
    quarter = LEVELS / 4
    norm = math.sqrt(2) / 2 * LEVELS / 2
    assert found == [
        math.floor(quarter),
        math.floor(-quarter),
        2,
        0,
        math.floor(norm),
        math.floor(4 / 16 / 2 * LEVELS),
    ]


def test_rounding_has_no_bias() -> None:
    """A million equal values between two levels: their mean is theirs, within 4 σ."""
    count, bound = 1_000_000, 2000.0
    quantiser = Quantiser(bound, 1, count)
    value = 0.37 * bound / LEVELS  # between the levels 0 and 1
    update = Contribution(np.full(count, value), 1)
    vector = quantise(quantiser, update, rounding(3, 1, 0, quantiser.size))
    levels = vector[:count].view(np.int32)
    sigma = math.sqrt(0.37 * 0.63 / count)
    assert set(levels.tolist()) == {0, 1}
    assert abs(levels.mean() - 0.37) < 4 * sigma


def test_sums_of_255_never_wrap() -> None:
    quantiser, most = Quantiser(1.0, 1, 1), np.full(5, 2**32 - 1, np.uint32)
    for value in (1.0, -1.0, 1e30, -1e30):
        vector = quantise(quantiser, Contribution(np.array([value]), 1, 99.0), most)
        assert abs(int(vector.view(np.int32)[0])) <= LEVELS
        total = np.zeros(5, np.uint32)
        for _ in range(255):
            total += vector
        assert signed(total) == [255 * level for level in signed(vector)]


def test_words_of_members_and_rounds_differ() -> None:
    words = [
        rounding(seed, round, member, 9).tolist()
        for seed, round, member in ((1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0))
    ]
    assert len({tuple(own) for own in words}) == 4
    assert rounding(1, 1, 0, 9).tolist() == words[0]
    assert rounding(1, 1, 0, 4).tolist() == words[0][:4]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_answer(bad: float) -> None:
    quantiser, words = Quantiser(1.0, 1, 2), np.zeros(6, np.uint32)
    with pytest.raises(SecureSumError, match="not finite"):
        quantise(quantiser, Contribution(np.array([0.0, bad]), 1), words)
    with pytest.raises(SecureSumError, match="not finite"):
        quantise(quantiser, Contribution(np.zeros(2), 1, bad), words)


def test_sums_decode_within_the_stated_error() -> None:
    """Σ w u of ten members, against fp64; one of them is longer than R."""
    draw, members, values = np.random.default_rng(1), 10, 4096
    quantiser = Quantiser(2.0, 40, values)
    updates = draw.normal(size=(members, values))
    updates /= np.linalg.norm(updates, axis=1, keepdims=True)
    updates[3] *= 5
    weights = draw.integers(1, 41, members)
    total, exact = np.zeros(quantiser.size, np.uint32), np.zeros(values)
    for member, (update, weight) in enumerate(zip(updates, weights.tolist(), strict=True)):
        own = Contribution(update, weight, 2.0)
        total += quantise(quantiser, own, rounding(0, 1, member, quantiser.size))
        exact += weight * update * min(1, 2 / np.linalg.norm(update))
    found = decode(quantiser, total, members)
    assert found.weight == weights.sum()
    assert found.clipped == 1
    norms = np.minimum(np.linalg.norm(updates, axis=1), 2)
    assert found.norm == pytest.approx(float(weights @ norms), rel=1e-4)
    assert found.loss == pytest.approx(2.0 * weights.sum(), rel=1e-4)
    # Each of ten roundings has a variance of at most 1/4 of a unit.
    unit = 2.0 * 40 / LEVELS
    off = np.linalg.norm(found.values - exact)
    assert off < 1.1 * unit * math.sqrt(members * values) / 2
    assert quantiser.error(40, 1.0) == pytest.approx(2.0 * math.sqrt(values) / 2**24)


def test_sums_that_honest_members_cannot_have_are_refused() -> None:
    quantiser = Quantiser(1.0, 2, 2)
    vector = quantise(quantiser, Contribution(np.ones(2), 2), np.zeros(6, np.uint32))
    with pytest.raises(SecureSumError, match="weight of 2, 3 members"):
        decode(quantiser, vector, 3)
    heavy = vector + np.array([0, 0, 7, 0, 0, 0], np.uint32)
    with pytest.raises(SecureSumError, match="weight of 9"):
        decode(quantiser, heavy, 2)
    long = vector + np.array([1 << 25, 0, 0, 0, 0, 0], np.uint32)
    with pytest.raises(SecureSumError, match="norm"):
        decode(quantiser, long, 1)


@pytest.mark.parametrize(
    ("slot", "levels"), [(1, 2), (1, -1), (2, LEVELS + 2), (2, -1), (3, LEVELS + 2), (3, -1 << 24)]
)
def test_slots_that_honest_members_cannot_have_are_refused(slot: int, levels: int) -> None:
    """A count of clipped updates moves the clip of dp=client, a norm the bound of all others."""
    quantiser = Quantiser(1.0, 2, 1)
    vector = quantise(quantiser, Contribution(np.zeros(1), 2), np.zeros(5, np.uint32))
    vector[1 + slot] = levels & 0xFFFFFFFF
    with pytest.raises(SecureSumError, match="members have at most 1 and"):
        decode(quantiser, vector, 1)


def test_slots_at_their_bounds_are_decoded() -> None:
    quantiser = Quantiser(1.0, 2, 1)
    longest, up = Contribution(np.full(1, 9.0), 2, -99.0), np.full(5, 2**32 - 1, np.uint32)
    found = decode(quantiser, quantise(quantiser, longest, up), 1)
    assert found.clipped == 1
    assert (found.norm, found.loss) == pytest.approx((2.0, -32.0), rel=1e-6)


@pytest.mark.parametrize("weight", [0, 3, -1])
def test_weights_are_bounded(weight: int) -> None:
    with pytest.raises(SecureSumError, match="weight"):
        quantise(Quantiser(1.0, 2, 1), Contribution(np.ones(1), weight), np.zeros(5, np.uint32))


@pytest.mark.parametrize(
    "fields",
    [(0.0, 1, 1, 4), (math.nan, 1, 1, 4), (1.0, 0, 1, 4), (1.0, 1 << 24, 1, 4), (1.0, 1, 0, 4)],
)
def test_quantisers_that_make_no_sums_are_refused(fields: tuple[float, int, int, int]) -> None:
    with pytest.raises(SecureSumError):
        Quantiser.unpack(struct.pack("<dIIH", *fields))
    assert Quantiser.unpack(Quantiser(1.0, 1, 1).pack()) == Quantiser(1.0, 1, 1)
    with pytest.raises(SecureSumError, match="slots"):
        Quantiser.unpack(struct.pack("<dIIH", 1.0, 1, 1, 5))
