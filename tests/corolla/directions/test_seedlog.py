import hashlib
import itertools
import json
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corolla.aggregation.sums import SeedSums
from corolla.directions import seedlog, signs
from corolla.types import Params, Payload, Size, Walk, row_name
from corolla.wire import messages

BASE = "ab" * 32
FIRST: Payload = {"start": {"w": torch.arange(3.0)}, "key": {"seed": torch.tensor(7)}}


def a_row(seed: int, step: float = 1.0, dtype: torch.dtype = torch.float16) -> Params:
    scalars = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    return {"scalars": scalars.to(dtype), "step": torch.tensor(step)}


# Versions


def test_a_version_is_a_hash_of_all_that_led_to_it() -> None:
    origin = seedlog.origin(BASE, FIRST)
    found = seedlog.versions(origin, [a_row(1), a_row(2), a_row(3)])
    assert found[0] == origin
    assert len(set(found)) == 4
    for before, row, version in zip(found, map(a_row, (1, 2, 3)), found[1:], strict=False):
        assert seedlog.after(before, row) == version
    for version in found:
        assert len(version) == 32
        assert set(version) <= set("0123456789abcdef")
    assert seedlog.versions(origin, []) == [origin]


def test_a_version_can_be_computed_by_anyone() -> None:
    """From the definition: blake2b over the version before and the sha256 of the row."""
    row = a_row(1, 0.5)
    sha = hashlib.sha256()
    sha.update(b"scalars|torch.float16|(8,)|" + row["scalars"].numpy().tobytes())
    sha.update(b"step|torch.float32|()|" + row["step"].numpy().tobytes())
    before = seedlog.origin(BASE, FIRST)
    text = f"{before}|{sha.hexdigest()}".encode()
    assert seedlog.after(before, row) == hashlib.blake2b(text, digest_size=16).hexdigest()


def test_other_bases_and_other_starts_are_other_origins() -> None:
    moved = {**FIRST, "start": {"w": torch.tensor([0.0, 1.0, 2.0000002])}}
    renamed = {**FIRST, "start": {"v": torch.arange(3.0)}}
    reseeded = {**FIRST, "key": {"seed": torch.tensor(8)}}
    found = {seedlog.origin(BASE, state) for state in (FIRST, moved, renamed, reseeded)}
    found |= {seedlog.origin(base, FIRST) for base in ("cd" * 32, "")}
    assert len(found) == 6
    assert seedlog.origin(BASE, dict(reversed(list(FIRST.items())))) in found


def test_a_gap_a_swap_and_a_foreign_row_end_elsewhere() -> None:
    origin = seedlog.origin(BASE, FIRST)
    rows = [a_row(1), a_row(2), a_row(3)]
    right = seedlog.versions(origin, rows)[-1]
    nearly = a_row(2)["scalars"].clone()
    nearly[3] = torch.nextafter(nearly[3], torch.tensor(9.0, dtype=torch.float16))
    wrong: list[Sequence[Params]] = [
        rows[:2],
        rows[1:],
        [rows[0], rows[2]],
        [rows[1], rows[0], rows[2]],
        [*rows, rows[2]],
        [rows[0], {**rows[1], "scalars": nearly}, rows[2]],
        [rows[0], a_row(2, 2.0), rows[2]],
        [rows[0], a_row(2, dtype=torch.float32), rows[2]],
    ]
    found = {seedlog.versions(origin, log)[-1] for log in wrong}
    assert right not in found
    assert len(found) == len(wrong)
    assert right not in seedlog.versions(seedlog.origin("cd" * 32, FIRST), rows)


def test_rows_are_in_the_order_of_their_numbers() -> None:
    rows = {row_name(number): a_row(number) for number in (12, 2, 1_000_001, 1)}
    found = seedlog.rows({**rows, **FIRST})
    assert list(found) == [1, 2, 12, 1_000_001]
    assert all(torch.equal(found[n]["scalars"], a_row(n)["scalars"]) for n in found)
    assert seedlog.rows(FIRST) == {}
    assert row_name(2) == "log-000002"


# Rows


def value(row: Params) -> Tensor:
    return row["scalars"].double() * float(row["step"])


@pytest.mark.parametrize("exponent", [-100, -60, -30, -14, 0, 14, 40, 120])
def test_half_precision_rows_keep_eleven_bits_at_any_scale(exponent: int) -> None:
    sums = torch.randn(512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums *= 2.0**exponent
    row = seedlog.row(sums, torch.float16)
    assert row["scalars"].dtype == torch.float16
    assert row["step"].dtype == torch.float32
    assert math.frexp(float(row["step"]))[0] == 0.5  # a power of two: exact
    assert 2**13 <= float(row["scalars"].abs().max()) <= 2**14
    off = (value(row) - sums).abs()
    large = sums.abs() > float(sums.abs().max()) * 2.0**-26  # smaller ones are subnormal
    assert bool((off[large] <= sums.abs()[large] * 2.0**-11).all())
    assert float((value(row) - sums).norm() / sums.norm()) < 2.0**-11


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=False),
        min_size=1,
        max_size=8,
    )
)
def test_rows_are_finite_and_within_half_a_unit(numbers: list[float]) -> None:
    sums = torch.tensor(numbers, dtype=torch.float64)
    row = seedlog.row(sums, torch.float16)
    assert bool(row["scalars"].isfinite().all())
    assert 0 < float(row["step"]) < math.inf
    assert float((value(row) - sums).abs().max()) <= float(sums.abs().max()) * 2.0**-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_of_zeros_moves_nothing(dtype: torch.dtype) -> None:
    row = seedlog.row(torch.zeros(4, dtype=torch.float64), dtype)
    assert row["scalars"].tolist() == [0.0] * 4
    assert float(row["step"]) == 1.0


def test_single_precision_rows_are_the_sums_themselves() -> None:
    sums = torch.tensor([1e-30, -3.3, 1e30], dtype=torch.float64)
    row = seedlog.row(sums, torch.float32)
    assert torch.equal(row["scalars"], sums.float())
    assert float(row["step"]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_has_the_same_version_after_it_has_travelled(dtype: torch.dtype) -> None:
    for numbers in ([0.0, -0.0, 3.25, 0.0], [1e-7, 2.0, -3.0, 4.0], [-0.0] * 4, [0.0] * 400):
        row = seedlog.row(torch.tensor(numbers, dtype=torch.float64), dtype)
        origin = seedlog.origin(BASE, FIRST)
        version = seedlog.after(origin, row)
        task = messages.Task(
            "ab" * 16,
            1,
            "v",
            messages.Kind.TRAIN,
            json.dumps({}),
            log=messages.Log(origin, origin, version, [row], 1),
        )
        log = messages.unpack_task(messages.pack_task(task)).log
        assert log is not None
        assert seedlog.versions(origin, log.rows)[-1] == version


# What clients send


def test_directions_are_given_or_follow_from_the_seed() -> None:
    walk = Walk(torch.tensor([0.5, -1.0, 2.0]), -0.25, {}, 3, {})
    given_ = seedlog.upload(walk, directions=torch.tensor([3, 0, 3], dtype=torch.int32))
    assert seedlog.directions(given_, 4).tolist() == [3, 0, 3]
    drawn = seedlog.upload(walk, seed=torch.tensor(11))
    found = seedlog.directions(drawn, 8)
    assert found.dtype == torch.int64
    assert found.tolist() == [int(w) % 8 for w in signs.words((11, 0), 0, 3, stream=1)]
    assert (float(drawn["step"]), drawn["scalars"].tolist()) == (-0.25, [0.5, -1.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_upload_looks_as_announced(dtype: torch.dtype) -> None:
    walk = Walk(torch.ones(5, dtype=dtype), -0.25, {}, 3, {})
    size = Size(0, 0, scalars=5, trainer="zeroth_order", seed=9, step=-0.25)
    for own, like in (
        (seedlog.upload(walk, seed=torch.tensor(9)), seedlog.upload_like(size, dtype)),
        (
            seedlog.upload(walk, directions=torch.arange(5, dtype=torch.int32)),
            seedlog.upload_like(size, dtype, pool_size=8),
        ),
    ):
        assert {n: (t.shape, t.dtype) for n, t in own.items()} == {
            n: (t.shape, t.dtype) for n, t in like.items()
        }
        assert float(like["step"]) == float(own["step"]) == -0.25
        largest = {n: int(t.max()) for n, t in like.items() if not t.is_floating_point()}
        assert largest in ({"seed": 9}, {"directions": 7})


# Their sums


def an_update(directions: Sequence[int], g: Sequence[float], step: float = -0.5) -> Payload:
    group = {
        "scalars": torch.tensor(g),
        "step": torch.tensor(step),
        "directions": torch.tensor(directions, dtype=torch.int32),
    }
    return {"scalars": group}


def test_sums_by_hand() -> None:
    """p = 1/4 and 3/4; direction 2 twice in one client, once in the other."""
    sums = SeedSums(4)
    sums.add(an_update([2, 0, 2], [1.0, 4.0, 3.0], -0.5), 1)
    sums.add(an_update([3, 2, 3], [8.0, 2.0, -8.0], 2.0), 3)
    wanted = [-0.5 * 4 / 4, 0.0, -0.5 * 4 / 4 + 0.75 * 4, 0.0]
    assert sums.finalise()["scalars"]["scalars"].tolist() == wanted


whole = st.integers(-100, 100)
replies = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 7), whole), min_size=1, max_size=5), st.integers(1, 8)
    ),
    min_size=1,
    max_size=6,
)


@given(replies, st.data())
def test_sums_are_a_monoid(
    updates: list[tuple[list[tuple[int, int]], int]], data: st.DataObject
) -> None:
    """Any tree over any order: of whole numbers, bit for bit."""

    def tree(parts: Sequence[tuple[Payload, int]]) -> SeedSums:
        made = SeedSums(8)
        if len(parts) == 1:
            made.add(*parts[0])
        elif parts:
            cut = data.draw(st.integers(0, len(parts)))
            if cut in (0, len(parts)):  # one side is the neutral element
                for part in parts:
                    made.add(*part)
            else:
                made.merge(tree(parts[:cut]))
                made.merge(tree(parts[cut:]))
        return made

    parts = [(an_update([k for k, _ in ks], [float(g) for _, g in ks]), n) for ks, n in updates]
    flat = SeedSums(8)
    for part in parts:
        flat.add(*part)
    flat.merge(SeedSums(8))
    mixed = tree(data.draw(st.permutations(parts)))
    wanted = [0.0] * 8
    for ks, n in updates:
        for k, g in ks:
            wanted[k] += -0.5 * g * n
    total = sum(n for _, n in updates)
    for found in (flat, mixed):
        assert found.finalise()["scalars"]["scalars"].tolist() == [w / total for w in wanted]


def test_any_order_and_grouping_of_real_numbers_agree_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (an_update([m % 8, 3, (3 * m) % 8], torch.randn(3, generator=generator).tolist()), m + 1)
        for m in range(4)
    ]
    found = []
    for order in itertools.permutations(parts):
        left, right = SeedSums(8), SeedSums(8)
        for part in order[:2]:
            left.add(*part)
        for part in order[2:]:
            right.add(*part)
        left.merge(right)
        found.append(left.finalise()["scalars"]["scalars"])
    assert all(float((one - found[0]).norm() / found[0].norm()) < 1e-15 for one in found)


def test_no_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to sum"):
        SeedSums(8).finalise()
