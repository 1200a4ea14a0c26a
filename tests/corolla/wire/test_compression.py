import json
import math
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corolla import seeds
from corolla.errors import ConfigError, WireError
from corolla.types import Payload
from corolla.wire import codec
from corolla.wire.compression import blank, feedback, form, pipeline

NUMBERS = ["fp16", "bf16", "int8", "int4"]
LEVELS = {"int8": 127, "int4": 7}
BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4}


def normal(*shape: int, seed: int = 0, scale: float = 1e-3) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed, "payload", *shape)) * scale


def payload() -> Payload:
    """Two groups out of order, whole and single numbers, an empty group and an empty tensor."""
    return {
        "head": {"score.weight": normal(4, 3), "step": torch.tensor(0.5)},
        "adapter": {"m.lora_B": normal(7, 2, scale=1e-5), "m.lora_A": normal(2, 9).T},
        "counts": {"n": torch.arange(3)},
        "none": {},
        "empty": {"x": torch.empty(0, 5)},
    }


def factor_pairs(rank: int, *, out: int = 12, into: int = 9) -> Payload:
    """Baked factors of two modules, one of them of a rank below 3, and a head."""
    return {
        "factors": {
            "wide.lora_A": normal(rank, into),
            "wide.lora_B": normal(out, rank, seed=1),
            "thin.lora_A": normal(2, into, seed=2),
            "thin.lora_B": normal(out, 2, seed=3),
        },
        "head": {"score.weight": normal(3, 4, seed=4)},
    }


def flat(params: Payload) -> Tensor:
    """All compressed values in the order of the wire."""
    values = [
        params[g][n].reshape(-1)
        for g in sorted(params)
        for n in sorted(params[g])
        if params[g][n].is_floating_point() and params[g][n].dim()
    ]
    return torch.cat(values) if values else torch.empty(0)


def same(a: Payload, b: Payload) -> bool:
    """Groups, names, shapes, types and bits."""
    return {g: set(p) for g, p in a.items()} == {g: set(p) for g, p in b.items()} and all(
        t.dtype == b[g][n].dtype
        and t.shape == b[g][n].shape
        and t.contiguous().reshape(-1).view(torch.uint8).tolist()
        == b[g][n].contiguous().reshape(-1).view(torch.uint8).tolist()
        for g, params in a.items()
        for n, t in params.items()
    )


def through(steps: list[str], params: Payload, seed: int = 0) -> Payload:
    made = pipeline(steps)
    return made.decode(made.encode(params, seed), params)


def content(data: bytes) -> bytes:
    """What a pipeline without zstd has put on the wire."""
    return codec.decode(data)[""]["content"].numpy().tobytes()


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["topk:0.1"], "did you mean 'top_k'"),
        (["gzip!!"], "known are rank, top_k, fp16, bf16, int8, int4, zstd"),
        (["int8", "fp16"], "each at most once"),
        (["int8", "int8"], "each at most once"),
        (["zstd", "int8"], "int8 cannot stand there"),
        (["int8", "top_k:0.1"], "the order is rank:R, top_k:DENSITY"),
        (["top_k:0.1", "rank:4"], "rank cannot stand there"),
        *((["top_k" + value], "in \\(0, 1\\]") for value in ("", ":", ":0", ":1.1", ":-1", ":x")),
        *((["top_k:" + value], "in \\(0, 1\\]") for value in ("nan", "inf", "1e-999999999")),
        *((["rank" + value], "whole number") for value in ("", ":", ":0", ":-1", ":2.5", ":٣")),
        (["rank:" + "9" * 5000], "whole number"),
        (["int8:3"], "takes no value"),
        (["zstd:19"], "takes no value"),
        ([""], "unknown codec step ''"),
    ],
)
def test_a_pipeline_without_sense_is_refused_in_one_line(steps: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        pipeline(steps)
    assert "\n" not in str(error.value)


def test_a_pipeline_says_what_it_needs() -> None:
    facts = {
        "zstd": (False, False, False),
        "int4": (True, False, False),
        "top_k:0.5": (True, True, False),
        "rank:2": (True, False, True),
    }
    for step, expected in facts.items():
        made = pipeline([step])
        assert (made.lossy, made.needs_differences, made.needs_factors) == expected
    assert not pipeline([]).lossy


# ------------------------------------------------------------------ lossless


def test_the_empty_pipeline_is_the_codec() -> None:
    made = pipeline([])
    data = made.encode(payload(), 3)
    assert data == codec.encode(payload())
    assert same(made.decode(data, {}), payload())
    assert made.content_bytes(payload()) == (codec.content_bytes(payload()), False)


@pytest.mark.parametrize("steps", [["zstd"], ["top_k:1"], ["top_k:1.0", "zstd"]])
def test_lossless_steps_give_every_bit_back(steps: list[str]) -> None:
    assert same(through(steps, payload()), payload())


floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """Any bits, also NaN, in 0 to 3 dimensions."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    found = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return found.reshape(shape)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    """Any payload of one floating type, with integers between."""
    dtype = draw(floats)
    either = tensors(dtype) | tensors(torch.int32)
    names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=4)
    groups = st.dictionaries(names, st.dictionaries(names, either, max_size=3), max_size=3)
    made: Payload = draw(groups)
    return made


@given(payloads(), st.sampled_from([["zstd"], ["top_k:1"], []]))
def test_any_bits_pass_where_nothing_is_lost(params: Payload, steps: list[str]) -> None:
    if steps == ["top_k:1"]:  # a lossy step by name
        params = {g: {n: t.nan_to_num() for n, t in p.items()} for g, p in params.items()}
    assert same(through(steps, params), params)


@given(
    payloads(),
    st.sampled_from(["0.001", "0.03", "0.3", "0.9"]),
    st.sampled_from([None, *NUMBERS]),
    st.booleans(),
)
def test_any_finite_payload_comes_back_in_its_form(
    params: Payload, density: str, number: str | None, zstd: bool
) -> None:
    params = {g: {n: t.nan_to_num() for n, t in p.items()} for g, p in params.items()}
    made = pipeline([f"top_k:{density}", *([number] if number else []), *["zstd"][: 1 * zstd]])
    data = made.encode(params, 1)
    found = made.decode(data, params)
    bytes_, at_most = made.content_bytes(params)
    really = codec.content_bytes(codec.decode(data))
    assert really <= bytes_ if at_most else really == bytes_
    for group, tensors_ in params.items():
        for name, tensor in tensors_.items():
            assert found[group][name].shape == tensor.shape
            assert found[group][name].dtype == tensor.dtype
            assert bool(torch.isfinite(found[group][name]).all())
            if not tensor.is_floating_point() or not tensor.dim():
                assert torch.equal(found[group][name], tensor)


def test_integers_single_values_and_scalar_groups_stay_as_they_are() -> None:
    walk = {"scalars": normal(5), "step": torch.tensor(0.25), "seed": torch.tensor(7)}
    params = {**payload(), "walk": walk}
    found = through(["top_k:0.1", "int4", "zstd"], params)
    assert same({"walk": found["walk"]}, {"walk": walk})
    assert same({"c": found["counts"]}, {"c": params["counts"]})
    assert torch.equal(found["head"]["step"], torch.tensor(0.5))
    assert not torch.equal(found["head"]["score.weight"], params["head"]["score.weight"])


def test_what_has_nothing_to_compress_travels_as_it_is() -> None:
    params = {"walk": {"scalars": normal(5)}, "counts": {"n": torch.arange(3)}, "none": {}}
    made = pipeline(["top_k:0.1", "int8", "zstd"])
    assert made.pack(params, 0) is params
    assert made.unpack(params, params) is params
    assert feedback(made, params, {}, 0)[1] == {}


def test_other_groups_pass_beside() -> None:
    """A broadcast sends cached groups in the same message."""
    made, other = pipeline(["int8"]), {"cached": {"A": normal(3)}}
    found = made.unpack({**other, **made.pack(payload(), 0)}, payload())
    assert same(found, {**other, **made.decode(made.encode(payload(), 0), payload())})


def test_a_form_passes_json() -> None:
    like = blank(json.loads(json.dumps(form(payload()))))
    made = pipeline(["int8", "zstd"])
    data = made.encode(payload(), 0)
    assert same(made.decode(data, like), made.decode(data, payload()))
    assert {t.device.type for p in like.values() for t in p.values()} == {"meta"}


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("density", [None, "1", "0.4", "0.02", "1e-9"])
@pytest.mark.parametrize("number", [None, *NUMBERS])
def test_bytes_are_those_of_the_formula(density: str | None, number: str | None) -> None:
    """FLASC: min(k (b + 4), k b + P / 8); int8: P + 4 for each tensor."""
    params = {
        "a": {"x": normal(101, 7), "y": normal(5)},
        "b": {"z": normal(30), "n": torch.ones(3)},
    }
    params["b"]["n"] = params["b"]["n"].int()
    p = 101 * 7 + 5 + 30
    k = p if density is None else max(1, math.floor(float(density) * p))
    expected = math.ceil(k * (BITS[number] if number else 32) / 8)
    expected += min(4 * k, math.ceil(p / 8)) if k < p else 0
    expected += 4 * 3 if number in LEVELS else 0
    expected += 4 * 3  # whole numbers
    steps = [f"top_k:{density}"] if density else []
    made = pipeline([*steps, *([number] if number else [])])
    sent = codec.decode(made.encode(params, 0))
    assert made.content_bytes(params) == (expected, False)
    assert sum(t.numel() * t.element_size() for g in sent.values() for t in g.values()) == expected


def test_ten_percent_in_int8_is_nearly_thirty_times_less() -> None:
    params = {"adapter": {"x": normal(1000, 100), "y": normal(1000, 100)}}
    size, at_most = pipeline(["top_k:0.1", "int8"]).content_bytes(params)
    assert (size, at_most) == (20_000 + 25_000 + 8, False)


def test_densities_are_decimal() -> None:
    """0.29 · 100 is 28.999999999999996 in binary."""
    found = through(["top_k:0.29"], {"a": {"x": normal(100)}})
    assert int(found["a"]["x"].count_nonzero()) == 29


def test_the_wire_is_as_the_docstring_says() -> None:
    """Decoded with NumPy alone: peaks, bitmap or indices, codes."""
    params = {"b": {"y": normal(50)}, "a": {"x": normal(13, 3)}}
    p = 89
    for density, k in (("0.5", 44), ("0.02", 1)):
        made = pipeline([f"top_k:{density}", "int4"])
        data = made.encode(params, 5)
        raw = content(data)
        peaks, rest = np.frombuffer(raw[:8], "<f4"), raw[8:]
        if k == 44:
            bits, codes = rest[:12], rest[12:]
            support = np.unpackbits(np.frombuffer(bits, "u1"), bitorder="little").nonzero()[0]
        else:
            support, codes = np.frombuffer(rest[:4], "<i4"), rest[4:]
        nibbles = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)][:k]
        values = np.zeros(p)
        values[support] = (np.array(nibbles) - 8) / 7 * np.where(support < 39, *peaks)
        np.testing.assert_allclose(flat(made.decode(data, params)), values, rtol=1e-6)


def test_zstd_that_does_not_help_is_left_out() -> None:
    random = torch.randint(0, 256, (4000,), generator=seeds.generator(0, "r"), dtype=torch.uint8)
    noise = {"a": {"x": random.view(torch.float32).nan_to_num()}}
    made = pipeline(["zstd"])
    assert made.encode(noise, 0) == codec.encode(
        {"": {"content": noise["a"]["x"].view(torch.uint8)}}
    )
    zeros = {"a": {"x": torch.zeros(1000)}}
    assert len(made.encode(zeros, 0)) < 200
    assert made.content_bytes(zeros) == (4000, True)


# ------------------------------------------------------------------ top-k


@pytest.mark.parametrize("density", ["0.001", "0.03", "0.031", "0.25", "0.999"])
def test_the_support_is_the_largest_values_over_all_tensors(density: str) -> None:
    params = payload()
    values = flat(params).numpy()
    k = max(1, math.floor(float(density) * len(values)))
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))
    expected = np.zeros_like(values)
    expected[order[:k]] = values[order[:k]]
    found = flat(through([f"top_k:{density}"], params)).numpy()
    assert found.tobytes() == expected.tobytes()
    assert np.count_nonzero(found) == k


@pytest.mark.parametrize("number", [None, *NUMBERS])
def test_ties_go_to_the_first(number: str | None) -> None:
    x = torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0, 2.0, 1.0, 0.5])
    steps = ["top_k:0.5", *([number] if number else [])]
    found = through(steps, {"a": {"x": x}})["a"]["x"]
    assert found.tolist() == [0, -2, 2, 2, -2, 0, 0, 0]


def test_a_sum_of_decoded_is_the_sparse_sum() -> None:
    parts = [{"a": {"x": normal(40, seed=s)}} for s in range(3)]
    total = sum(through(["top_k:0.2"], part)["a"]["x"] for part in parts)
    expected = torch.zeros(40)
    for part in parts:
        index = part["a"]["x"].abs().argsort(descending=True, stable=True)[:8]
        expected[index] += part["a"]["x"][index]
    assert torch.equal(torch.as_tensor(total), expected)


# ------------------------------------------------------------------ error feedback


@pytest.mark.parametrize(
    "steps", [["top_k:0.1"], ["top_k:0.1", "int8", "zstd"], ["int4"], ["bf16"]]
)
def test_error_feedback_loses_nothing(steps: list[str]) -> None:
    """Sent + residual == update + old residual, round after round.

    But for the rounding of that sum and of the residual to float32: each by half a unit in the
    last place, at most 2^-24 of the value.
    """
    made = pipeline(steps)
    residual: Payload = {}
    updates, received = torch.zeros(89).double(), torch.zeros(89).double()
    rounding = torch.zeros(89).double()
    for round in range(20):
        params = {"b": {"y": normal(50, seed=round)}, "a": {"x": normal(13, 3, seed=round)}}
        before = flat(params) + (flat(residual) if residual else 0)
        packed, residual = feedback(made, params, residual, round)
        sent, left = flat(made.unpack(packed, params)), flat(residual).double()
        if steps == ["top_k:0.1"]:
            assert torch.equal(sent + flat(residual), before)
            assert torch.equal(flat(residual) == 0, sent != 0)
        assert bool(((sent.double() + left - before.double()).abs() <= 2**-24 * left.abs()).all())
        updates += flat(params).double()
        received += sent.double()
        rounding += 2**-24 * (before.double().abs() + left.abs())
    assert bool(((received + left - updates).abs() <= rounding).all())
    assert float(flat(residual).norm()) > 0


def test_what_top_k_leaves_out_is_sent_later() -> None:
    """Constant updates: with feedback every value gets through, without the small never do."""
    made, x = pipeline(["top_k:0.1"]), torch.linspace(1.0, 2.0, 10)
    residual: Payload = {}
    with_feedback, without = torch.zeros(10), torch.zeros(10)
    for round in range(200):
        packed, residual = feedback(made, {"a": {"x": x}}, residual, round)
        with_feedback += made.unpack(packed, {"a": {"x": x}})["a"]["x"]
        without += through(["top_k:0.1"], {"a": {"x": x}})["a"]["x"]
    torch.testing.assert_close(with_feedback / 200, x, rtol=0.12, atol=0)
    assert int(without.count_nonzero()) == 1


def test_a_residual_is_of_what_is_compressed_alone() -> None:
    _, residual = feedback(pipeline(["top_k:0.1"]), payload(), {}, 0)
    assert {g: sorted(p) for g, p in residual.items()} == {
        "head": ["score.weight"],
        "adapter": ["m.lora_A", "m.lora_B"],
        "empty": ["x"],
    }
    _, residual = feedback(pipeline(["top_k:0.1"]), payload(), residual, 1)
    assert torch.equal(payload()["head"]["step"], torch.tensor(0.5))


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("number", ["int8", "int4"])
@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30))
def test_stochastic_rounding_is_off_by_less_than_a_level(number: str, x: list[float]) -> None:
    """Also for the largest and the smallest numbers there are; the peak itself is exact."""
    tensor = torch.tensor(x)
    found = through([number], {"a": {"x": tensor}}, seed=len(x))["a"]["x"]
    level = float(tensor.abs().max()) / LEVELS[number] if x else 0.0
    rounding = 2.0**-23 * tensor.double().abs() + 2.0**-149  # of the result to fp32
    assert bool(((found.double() - tensor.double()).abs() <= level + rounding).all())
    if x:
        peak = tensor[tensor.abs().argmax()]
        assert found[tensor.abs().argmax()] == peak


@pytest.mark.parametrize(("number", "levels"), LEVELS.items())
def test_stochastic_rounding_is_unbiased(number: str, levels: int) -> None:
    """The mean of n roundings of a value is within 4 sigma of it; levels themselves are exact."""
    n, parts = 4000, torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, -0.3, -1.7, 2.0])
    x = torch.cat([torch.tensor([float(levels)]), parts.repeat(n)])
    found = through([number], {"a": {"x": x}}, seed=1)["a"]["x"][1:].reshape(n, -1)
    chance = (parts - parts.floor()).double()
    sigma = (chance * (1 - chance) / n).sqrt()
    assert bool(((found.double().mean(0) - parts.double()).abs() <= 4 * sigma + 1e-6).all())
    assert bool((found[:, [0, 7]] == parts[[0, 7]]).all())
    assert set(found[:, 3].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("number", NUMBERS)
def test_zeros_stay_zeros(number: str) -> None:
    params = {"a": {"x": torch.zeros(5, 3), "y": normal(4)}}
    found = through(["top_k:0.9", number], params)
    assert torch.equal(found["a"]["x"], torch.zeros(5, 3))
    assert torch.equal(through([number], {"a": {"x": torch.zeros(7)}})["a"]["x"], torch.zeros(7))


def test_16_bit_numbers_are_those_of_torch_and_saturate() -> None:
    largest = 3.4028234663852886e38
    x = torch.tensor([0.1, -1 / 3, 1e-8, 65519.0, 65520.0, -1e6, largest, -largest, 1e-45, -0.0])
    half = through(["fp16"], {"a": {"x": x}})["a"]["x"]
    assert torch.equal(half, x.clamp(-65504, 65504).half().float())
    brain = through(["bf16"], {"a": {"x": x}})["a"]["x"]
    most = 255 / 128 * 2.0**127
    assert brain[6:8].tolist() == [most, -most]
    assert torch.equal(brain[:6], x[:6].bfloat16().float())
    assert math.copysign(1, float(brain[9])) == -1
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # halfway: to even
    assert through(["bf16"], {"a": {"x": ties}})["a"]["x"].tolist() == [1.0, 1 + 2 * 2.0**-7]


@pytest.mark.parametrize("number", NUMBERS)
def test_payloads_of_16_bit_tensors_keep_their_types(number: str) -> None:
    params = {"a": {"x": normal(6).bfloat16(), "y": normal(3).half()}}
    found = through([number], params)
    assert (found["a"]["x"].dtype, found["a"]["y"].dtype) == (torch.bfloat16, torch.float16)
    if number == "bf16":
        assert torch.equal(found["a"]["x"], params["a"]["x"])


def test_each_tensor_has_its_own_scale() -> None:
    params = {"a": {"small": normal(50, scale=1e-6), "large": normal(50, scale=1e3)}}
    for steps in (["int8"], ["top_k:0.6", "int8"]):
        found = through(steps, params)["a"]["large"]
        assert bool((found - params["a"]["large"]).abs().max() < 1e2)
    small = through(["int8"], params)["a"]["small"]
    torch.testing.assert_close(small, params["a"]["small"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [["int8"], ["int4", "zstd"], ["top_k:0.3", "int8"]])
def test_a_seed_decides_every_bit(steps: list[str]) -> None:
    made = pipeline(steps)
    state = torch.random.get_rng_state()
    assert made.encode(payload(), 3) == made.encode(payload(), 3)
    assert made.encode(payload(), 3) != made.encode(payload(), 4)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", ["fp16", "int8", "top_k:0.5", "rank:1"])
def test_what_is_not_finite_is_not_sent(step: str, value: float) -> None:
    params = factor_pairs(4)
    bad = {**params["factors"], "wide.lora_A": torch.full((4, 9), value)}
    with pytest.raises(WireError, match="not finite"):
        pipeline([step]).encode({**params, "factors": bad}, 0)


# ------------------------------------------------------------------ rank


@pytest.mark.parametrize("rank", [3, 5])
def test_truncated_factors_are_the_best_of_their_rank(rank: int) -> None:
    """Against the SVD of the dense product in fp64."""
    params = factor_pairs(8)
    found = through([f"rank:{rank}"], params)
    f = params["factors"]
    u, s, vt = torch.linalg.svd(f["wide.lora_B"].double() @ f["wide.lora_A"].double())
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    a, b = found["factors"]["wide.lora_A"], found["factors"]["wide.lora_B"]
    assert (a.shape, b.shape) == ((8, 9), (12, 8))
    assert not a[rank:].any() and not b[:, rank:].any()
    torch.testing.assert_close(b.double() @ a.double(), best, rtol=0, atol=1e-6 * float(s[0]))
    for name in ("thin.lora_A", "thin.lora_B"):
        assert torch.equal(found["factors"][name], f[name])
    assert torch.equal(found["head"]["score.weight"], params["head"]["score.weight"])


def test_a_rank_that_is_not_reached_changes_no_bit() -> None:
    assert same(through(["rank:8"], factor_pairs(8)), factor_pairs(8))


def test_factors_of_more_than_full_rank_lose_nothing() -> None:
    """Rank 9 is all that a (5, 9) product can have: 5."""
    params = factor_pairs(9, out=5)
    made = pipeline(["rank:8"])
    data = made.encode(params, 0)
    assert made.content_bytes(params) == (4 * (5 * 9 + 5 * 5 + 2 * 9 + 5 * 2 + 12), False)
    assert len(content(data)) == made.content_bytes(params)[0]
    found, f = made.decode(data, params)["factors"], params["factors"]
    torch.testing.assert_close(
        found["wide.lora_B"] @ found["wide.lora_A"], f["wide.lora_B"] @ f["wide.lora_A"]
    )


def test_rank_needs_factors() -> None:
    with pytest.raises(ValueError, match="needs a group 'factors', found"):
        pipeline(["rank:2"]).encode(payload(), 0)


def test_all_steps_together() -> None:
    params = factor_pairs(8)
    made = pipeline(["rank:4", "top_k:0.5", "int8", "zstd"])
    data = made.encode(params, 0)
    p = 4 * (12 + 9) + 2 * (12 + 9) + 12
    k = p // 2
    assert made.content_bytes(params) == (5 * 4 + math.ceil(p / 8) + k, True)
    found = made.decode(data, params)
    values = flat(through(["rank:4", "top_k:0.5"], params))
    assert int(values.count_nonzero()) == k
    assert bool(((flat(found) - values).abs() <= values.abs().max() / 127 * 1.001).all())


# ------------------------------------------------------------------ hostile bytes


def sealed(box: dict[str, Tensor], **groups: dict[str, Tensor]) -> bytes:
    return codec.encode({"": box, **groups})


def raw(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


LIKE: Payload = {"a": {"x": torch.empty(20, device="meta"), "y": torch.empty(4, device="meta")}}
ONES = np.array([1, 1], "<f4").tobytes()


def sparse(*indices: int) -> bytes:
    return np.array(indices, "<i4").tobytes()


@pytest.mark.parametrize(
    ("steps", "bad"),
    [
        ("int8", ONES + b"\x80" * 24),
        ("top_k:0.09", b"\x01\x80\x00" + b"abcd" * 2),
        ("top_k:0.01", b"\x01\x00\x00" + b"abcd"),
    ],
)
def test_well_formed_bytes_are_taken(steps: str, bad: bytes) -> None:
    """What the hostile ones below differ from."""
    found = pipeline([steps]).decode(sealed({"content": raw(bad)}), LIKE)
    assert (found["a"]["x"].shape, found["a"]["y"].shape) == ((20,), (4,))


@pytest.mark.parametrize(
    ("steps", "bad", "message"),
    [
        ("int8", b"", "0 bytes, expected 32"),
        ("int8", ONES + b"\x80" * 23, "31 bytes, expected 32"),
        ("int8", ONES + b"\x80" * 25, "33 bytes, expected 32"),
        ("int8", np.array([math.nan, 1], "<f4").tobytes() + b"\x80" * 24, "peaks are not finite"),
        ("int8", np.array([1, math.inf], "<f4").tobytes() + b"\x80" * 24, "peaks are not finite"),
        ("int8", np.array([-1, 1], "<f4").tobytes() + b"\x80" * 24, "peaks are not finite"),
        ("int8", ONES + b"\x00" + b"\x80" * 23, "codes are not between -127 and 127"),
        ("int4", ONES + b"\x80" + b"\x88" * 11, "codes are not between -7 and 7"),
        ("top_k:0.09", b"\x01\x00\x00" + b"abcd" * 2, "support is not 2 ascending"),
        ("top_k:0.09", b"\x01\x81\x00" + b"abcd" * 2, "support is not 2 ascending"),
        ("top_k:0.01", b"\x00\x00\x00" + b"abcd", "support is not 1 ascending"),
        ("top_k:0.01", b"\x01\x00\x00\x00\x00\x80\x7f", "not finite"),
        ("fp16", b"\x00\x7c" * 24, "not finite"),
        ("bf16", b"\xff\xff" * 24, "not finite"),
    ],
)
def test_malformed_content_is_refused(steps: str, bad: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        pipeline([steps]).decode(sealed({"content": raw(bad)}), LIKE)


@pytest.mark.parametrize(
    "indices", [(5, 5), (6, 5), (-1, 5), (5, 100), (2**31 - 1, 5), (-(2**31), 2**31 - 1)]
)
def test_indices_out_of_order_or_range_are_refused(indices: tuple[int, int]) -> None:
    like = {"a": {"x": torch.empty(100, device="meta")}}
    made = pipeline(["top_k:0.02"])
    good = sealed({"content": raw(sparse(5, 99) + b"abcd" * 2)})
    assert int(made.decode(good, like)["a"]["x"].count_nonzero()) == 2
    with pytest.raises(WireError, match="support is not 2 ascending indices below 100"):
        made.decode(sealed({"content": raw(sparse(*indices) + b"abcd" * 2)}), like)


def test_an_odd_code_too_many_is_refused() -> None:
    like = {"a": {"x": torch.empty(3, device="meta")}}
    one = np.array([1], "<f4").tobytes()
    assert pipeline(["int4"]).decode(sealed({"content": raw(one + b"\x88\x08")}), like)
    with pytest.raises(WireError, match="after the last"):
        pipeline(["int4"]).decode(sealed({"content": raw(one + b"\x88\x18")}), like)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        codec.encode({}),
        codec.encode({"": {}}),
        codec.encode({"a": {"x": torch.zeros(20), "y": torch.zeros(4)}}),
        sealed({"content": torch.zeros(24)}),
        sealed({"content": torch.zeros(8, 12).byte()}),
        sealed({"content": torch.zeros(96).byte(), "zstd": torch.zeros(1).byte()}),
        sealed({"other": torch.zeros(96).byte()}),
        sealed({"content": torch.zeros(96).byte()}, a={"x": torch.zeros(20)}),
        sealed({"content": torch.zeros(96).byte()}, b={}),
    ],
)
@pytest.mark.parametrize("steps", [["zstd"], ["top_k:1"]])
def test_other_payloads_are_refused(data: bytes, steps: list[str]) -> None:
    with pytest.raises(WireError):
        pipeline(steps).decode(data, LIKE)


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"b": {"n": torch.arange(3)}},
        {"b": {"n": torch.arange(2).int()}},
        {"b": {"m": torch.arange(2)}},
        {"c": {"n": torch.arange(2)}},
        {"b": {"n": torch.arange(2)}, "c": {"n": torch.arange(2)}},
    ],
)
def test_what_is_beside_must_have_its_form(rest: dict[str, dict[str, Tensor]]) -> None:
    like = {"a": {"x": torch.empty(1)}, "b": {"n": torch.empty(2, dtype=torch.int64)}}
    box = {"content": torch.zeros(4).byte()}
    made = pipeline(["top_k:1"])
    assert made.decode(sealed(box, b={"n": torch.arange(2)}), like)["b"]["n"].tolist() == [0, 1]
    with pytest.raises(WireError):
        made.decode(sealed(box, **rest), like)


def test_a_bomb_is_not_inflated() -> None:
    zeros = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
    good = zstandard.ZstdCompressor().compress(bytes(96))
    made = pipeline(["zstd"])
    assert made.decode(sealed({"zstd": raw(good)}), LIKE)["a"]["x"].tolist() == [0.0] * 20
    wrong = [zeros, unsized, good[:-1], good + b"x", good + good, b"", b"abc"]
    lying = good[:4] + bytes([good[4]]) + bytes([95]) + good[6:]
    tracemalloc.start()
    for frame in [*wrong, lying]:
        with pytest.raises(WireError):
            made.decode(sealed({"zstd": raw(frame)}), LIKE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(WireError, match="expected one content"):
        pipeline(["int8"]).decode(sealed({"zstd": raw(good)}), LIKE)


FUZZED = [
    ["zstd"],
    ["top_k:0.2", "int4"],
    ["top_k:0.02", "fp16"],
    ["int8", "zstd"],
    ["rank:3", "top_k:0.3", "int8", "zstd"],
]


@pytest.mark.parametrize("steps", FUZZED, ids=str)
@given(st.data())
def test_only_wire_errors_escape(steps: list[str], data: st.DataObject) -> None:
    """Bytes changed, cut, or made up inside a valid envelope."""
    made, like = pipeline(steps), factor_pairs(6)
    good = bytearray(made.encode(like, 0))
    kind = data.draw(st.sampled_from(["flip", "cut", "content", "zstd"]))
    if kind == "flip":
        for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=5)):
            good[place] = data.draw(st.integers(0, 255))
        bad = bytes(good)
    elif kind == "cut":
        bad = bytes(good[: data.draw(st.integers(0, len(good)))])
    else:
        size = made.content_bytes(like)[0]
        inside = data.draw(st.binary(max_size=20))
        inside = (inside * size)[:size]
        if kind == "zstd":
            inside = zstandard.ZstdCompressor().compress(inside)
        bad = sealed({kind: raw(inside)})
    found: Any = None
    with suppress(WireError):
        found = made.decode(bad, like)
    if found is not None:
        assert {g: {n: t.shape for n, t in p.items()} for g, p in found.items()} == {
            g: {n: t.shape for n, t in p.items()} for g, p in like.items()
        }


def test_what_is_owed_of_tensors_that_do_not_travel_stays_owed() -> None:
    """As with RoLoRA, whose updates hold B in one round and A in the next."""
    steps = pipeline(["top_k:0.5"])
    b = {"g": {"b": torch.tensor([1.0, 4.0])}}
    _, left = feedback(steps, b, {}, 0)
    assert left["g"]["b"].tolist() == [1.0, 0.0]
    _, left = feedback(steps, {"g": {"a": torch.tensor([2.0, 3.0])}}, left, 0)
    assert left["g"]["b"].tolist() == [1.0, 0.0]
    assert left["g"]["a"].tolist() == [2.0, 0.0]
