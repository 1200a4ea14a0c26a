"""The sign stream against an oracle in plain integers, which also writes the committed vectors:

python tests/corolla/directions/test_signs.py
"""

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.directions import signs

VECTORS = Path(__file__).resolve().parents[3] / "proto" / "signs-v1.json"
SOURCE = Path(signs.__file__).with_suffix(".c")
KERNEL = signs._kernel
MASK = (1 << 64) - 1
PATHS = ("c", "numpy", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Known answers of Random123 (kat_vectors, philox4x64-10): counter, key, words.
KNOWN = (
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
)


# --- the oracle: integers and struct only ---------------------------------------------------------


def philox(counter: tuple[int, ...], key: signs.Key) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = b >> 64 ^ c1 ^ k0, b & MASK, a >> 64 ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return c0, c1, c2, c3


def word(key: signs.Key, index: int, stream: int = 0) -> int:
    return philox((index // 4, stream, 0, 0), key)[index % 4]


def sign(key: signs.Key, k: int, i: int) -> int:
    odd = word(key, i // 64) >> i % 64 & 1 ^ (k & i).bit_count() & 1
    return -1 if odd else 1


def transform(a: list[float]) -> list[float]:
    v, h = list(a), 1
    while h < len(v):
        for i in range(len(v)):
            if not i & h:
                v[i], v[i + h] = v[i] + v[i + h], v[i] - v[i + h]
        h *= 2
    return v


def fp32(number: float) -> float:
    """The nearest fp32; a sum of two fp32 numbers in fp64 rounds the same as one in fp32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def hex32(number: float) -> str:
    return struct.pack(">f", number).hex()


def hex64(number: float) -> str:
    return struct.pack(">d", number).hex()


def narrow(number: float, dtype: str) -> str:
    """The bits of a half type nearest to an fp32 number, ties to even."""
    if dtype == "fp16":
        return struct.pack(">e", number).hex()
    if dtype == "bf16":
        bits = int(hex32(number), 16)
        return f"{bits + 0x7FFF + (bits >> 16 & 1) >> 16:04x}"
    return hex32(number)


def widen(text: str, dtype: str) -> float:
    wide: float = struct.unpack(
        ">e" if dtype == "fp16" else ">f",
        bytes.fromhex(text + ("0000" if dtype == "bf16" else "")),
    )[0]
    return wide


def ramp(count: int, start: float = -0.75) -> list[float]:
    """Some numbers of both signs and all sizes, exact in every type."""
    return [(start + i % 7 / 4) * 2.0 ** (i % 11 - 5) for i in range(count)]


def vectors() -> dict[str, Any]:
    """All test vectors; numbers of 64 bits and bit patterns as hex, most significant first."""
    keys: list[signs.Key] = [(0, 0), (7, 3), (MASK, 0x8000000000000001)]

    def name(key: signs.Key) -> list[str]:
        return [f"{part:016x}" for part in key]

    made: dict[str, Any] = {"version": 1, "generator": "philox4x64-10"}
    counters = [(0, 0, 0, 0), (1, 0, 0, 0), (5, 1, 0, 0), (2**32, 0, 0, 0)]
    made["philox"] = [
        {
            "counter": [f"{part:016x}" for part in counter],
            "key": name(key),
            "words": [f"{part:016x}" for part in philox(counter, key)],
        }
        for counter, key in [(c, k) for k in keys for c in counters] + [x[:2] for x in KNOWN]
    ]
    made["signs"] = [
        {
            "key": name(key),
            "k": k,
            "start": start,
            "signs": "".join("+-"[sign(key, k, i) < 0] for i in range(start, start + 64)),
        }
        for key in keys
        for k, start in ((0, 0), (1, 0), (63, 64), (64, 64), (4095, 4000), (65535, 2**40 + 77))
    ]
    made["choices"] = [
        {"seed": f"{seed:016x}", "size": size, "choices": drawn}
        for seed in (0, 12345, MASK)
        for size in (1, 512, 4096, 65536)
        for drawn in [[word((seed, 0), t, stream=1) % size for t in range(10)]]
    ]
    sums = [fp32(0.1 * x) for x in ramp(8)]
    made["fwht"] = [
        {"a": [hex32(x) for x in sums], "v": [hex64(x) for x in transform(sums)]},
    ]
    made["add"], made["replay"] = [], []
    for dtype in ("fp32", "bf16", "fp16"):
        source = [narrow(x, dtype) for x in ramp(40)]
        values = [widen(x, dtype) for x in source]
        terms = [(3, fp32(0.01)), (4090, fp32(-0.3)), (3, fp32(1e-4))]
        for k, scale in terms:
            values = [fp32(x + sign(keys[1], k, 250 + i) * scale) for i, x in enumerate(values)]
        made["add"].append(
            {
                "type": dtype,
                "key": name(keys[1]),
                "offset": 250,
                "terms": [[k, hex32(scale)] for k, scale in terms],
                "source": source,
                "out": [narrow(x, dtype) for x in values],
            }
        )
        values, logs = [widen(x, dtype) for x in source], []
        for key, size, scale in ((keys[1], 16, -0.003), (keys[2], 4, 0.7)):
            sums = [fp32(0.1 * x) for x in ramp(size, 0.25)]
            v = [fp32(scale * x) for x in transform(sums)]
            values = [
                fp32(x + sign(key, 0, 250 + i) * v[(250 + i) % size]) for i, x in enumerate(values)
            ]
            logs.append(
                {
                    "key": name(key),
                    "a": [hex32(x) for x in sums],
                    "scale": hex64(scale),
                    "v": [hex32(x) for x in v],
                }
            )
        made["replay"].append(
            {
                "type": dtype,
                "offset": 250,
                "logs": logs,
                "source": source,
                "out": [narrow(x, dtype) for x in values],
            }
        )
    return made


# --- every implementation -------------------------------------------------------------------------


def torch_philox(counter: Any, key: signs.Key, blocks: int) -> Any:
    return signs._torch_philox(counter, key, blocks).numpy().view(np.uint64)


def use(path: str, patch: pytest.MonkeyPatch) -> None:
    """Public functions take one path: the C kernel, NumPy, or torch as on other devices."""
    if path == "c":
        if KERNEL is None:
            pytest.skip("no C kernel: there was no compiler when Corolla was installed")
        return
    patch.setattr(signs, "_kernel", None)
    if path == "torch":
        patch.setattr(signs, "_numpy_philox", torch_philox)
        patch.setattr(signs, "_numpy_add", signs._torch_add)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    assert signs.compiled() == (request.param == "c")
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_known_answers_of_philox(path: str) -> None:
    made = {"c": signs._c_philox, "numpy": signs._numpy_philox, "torch": torch_philox}[path]
    for counter, key, expected in KNOWN:
        assert philox(counter, key) == expected
        assert tuple(made(counter, key, 1).tolist()) == expected


def test_the_vectors_are_those_of_the_oracle() -> None:
    assert json.loads(VECTORS.read_text()) == vectors()


def key_of(texts: list[str]) -> signs.Key:
    return int(texts[0], 16), int(texts[1], 16)


def tensor(texts: list[str], dtype: str) -> torch.Tensor:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return torch.tensor([widen(text, dtype) for text in texts]).to(kind)


def floats(texts: list[str]) -> Any:
    return np.array([int(text, 16) for text in texts], dtype=np.uint32).view(np.float32)


def test_vectors(path: str) -> None:
    made = json.loads(VECTORS.read_text())
    philoxes = {"c": signs._c_philox, "numpy": signs._numpy_philox, "torch": torch_philox}
    for case in made["philox"]:
        counter = tuple(int(part, 16) for part in case["counter"])
        drawn = philoxes[path](counter, key_of(case["key"]), 1)
        assert [f"{x:016x}" for x in drawn.tolist()] == case["words"]
    for case in made["signs"]:
        z = signs.signs(key_of(case["key"]), case["start"], case["start"] + 64, case["k"])
        assert "".join("-+"[x > 0] for x in z.tolist()) == case["signs"]
    for case in made["choices"]:
        drawn = signs.choices(int(case["seed"], 16), len(case["choices"]), case["size"])
        assert drawn.tolist() == case["choices"]
    for case in made["fwht"]:
        assert [hex64(x) for x in signs.fwht(floats(case["a"]))] == case["v"]
    for case in made["add"]:
        out = tensor(case["source"], case["type"])
        terms = [(k, widen(scale, "fp32")) for k, scale in case["terms"]]
        signs.add(out, key_of(case["key"]), case["offset"], terms)
        assert torch.equal(out, tensor(case["out"], case["type"]))
    for case in made["replay"]:
        out, logs = tensor(case["source"], case["type"]), []
        for log in case["logs"]:
            scale = struct.unpack(">d", bytes.fromhex(log["scale"]))[0]
            v = (scale * signs.fwht(floats(log["a"]))).astype(np.float32)
            assert [hex32(x) for x in v] == log["v"]
            logs.append((key_of(log["key"]), v))
        signs.replay(out, case["offset"], logs)
        assert torch.equal(out, tensor(case["out"], case["type"]))


# --- the same bits on every path ------------------------------------------------------------------

KEYS = st.tuples(st.integers(0, MASK), st.integers(0, MASK))
OFFSETS = st.integers(0, 20_000) | st.integers(2**32 - 300, 2**32 + 300) | st.integers(0, 2**50)


def random(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def random_logs(key: signs.Key, sizes: list[int], seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        ((key[0], (key[1] + r) & MASK), rng.standard_normal(size).astype(np.float32))
        for r, size in enumerate(sizes)
    ]


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=60)
@given(
    key=KEYS,
    offset=OFFSETS,
    count=st.integers(0, 400) | st.integers(3000, 10_000),
    dtype=st.sampled_from(DTYPES),
    ks=st.lists(st.integers(0, 65535), max_size=4),
    logs=st.lists(st.integers(0, 16), max_size=3),
    power=st.integers(0, 16),
)
def test_every_path_gives_the_same_bits(
    key: signs.Key,
    offset: int,
    count: int,
    dtype: torch.dtype,
    ks: list[int],
    logs: list[int],
    power: int,
) -> None:
    source = random(count, 1).to(dtype)
    terms = [(k, 0.1 * (-0.7) ** j) for j, k in enumerate(ks)]
    results = []
    for path in PATHS if KERNEL else PATHS[1:]:
        with pytest.MonkeyPatch.context() as patch:
            use(path, patch)
            added, replayed = torch.empty_like(source), source.clone()
            signs.add(added, key, offset, terms, source)
            signs.replay(replayed, offset, random_logs(key, [1 << p for p in logs], 2))
            folded = signs.fold(source, key, offset, 1 << power)
            z = signs.signs(key, offset, offset + count, ks[0] if ks else 0)
        results.append((bits(added), bits(replayed), folded.tobytes(), z.tobytes()))
    assert all(result == results[0] for result in results)


def test_tensors_larger_than_every_block(path: str, threads: None) -> None:
    """Across pieces and blocks, with 1 and 3 threads, in parts and as a whole, in every type."""
    offset, key = (1 << 20) - 12_345, (9, 9)
    count = 2_200_001 if path != "torch" else 1_100_001
    z = [torch.from_numpy(signs.signs(key, offset, offset + count, k)) for k in (5, 4097)]
    logs = random_logs(key, [4096, 65536], 3)
    for dtype in DTYPES:
        source = random(count, 4).to(dtype)
        plain = (source.float() + 0.25 * z[0] + float(np.float32(-0.1)) * z[1]).to(dtype)
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            added, replayed = source.clone(), torch.empty_like(source)
            signs.add(added, key, offset, [(5, 0.25), (4097, -0.1)])
            assert torch.equal(added, plain)
            signs.replay(replayed, offset, logs, source)
            results.append((bits(replayed), signs.fold(source, key, offset, 512).tobytes()))
        assert results[0] == results[1]
        parts = source.clone()
        for low, high in ((0, 77_777), (77_777, 1_060_000), (1_060_000, count)):
            signs.replay(parts[low:high], offset + low, logs)
        assert bits(parts) == results[0][0]


@settings(max_examples=40)
@given(KEYS, OFFSETS, st.integers(0, 65535), st.integers(0, 500), st.integers(0, 500))
def test_slices_are_slices_of_the_whole(key: signs.Key, start: int, k: int, a: int, b: int) -> None:
    low, high = sorted((a, b))
    whole = signs.signs(key, start, start + 500, k)
    assert whole[low:high].tolist() == signs.signs(key, start + low, start + high, k).tolist()
    stream = signs.words(key, start, 40, stream=2)
    assert stream[low // 13 : 30].tolist() == (
        signs.words(key, start + low // 13, 30 - low // 13, stream=2).tolist()
        if low // 13 < 30
        else []
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_from_a_source_are_the_same(path: str, dtype: torch.dtype) -> None:
    source, key = random(70_000, 5).to(dtype).view(100, 700), (1, 2)
    before = source.clone()
    for k in (0, 33):
        new, same = torch.full_like(source, 9), source.clone()
        signs.add(new, key, 12_345, [(k, 0.5)], source)
        signs.add(same, key, 12_345, [(k, 0.5)])
        assert torch.equal(new, same)
        z = torch.from_numpy(signs.signs(key, 12_345, 82_345, k)).view(100, 700)
        assert torch.equal(new, (source.float() + 0.5 * z).to(dtype))
    assert torch.equal(source, before)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_number_is_read_and_rounded(path: str, dtype: torch.dtype) -> None:
    """All finite numbers of the type, and sums that are ties, subnormal or overflow."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    source = every[every.isfinite()]
    z = torch.from_numpy(signs.signs((1, 2), 3, 3 + len(source), 9))
    for scale in (0.0, 2.0**-25, 3 * 2.0**-26, 1e-7, 3e-5, 2.0**-9, 1.0, 6e4, 3e38):
        out = source.clone()
        signs.add(out, (1, 2), 3, [(9, scale)])
        wanted = (source.float() + torch.tensor(scale) * z).to(dtype)
        assert bits(out) == bits(wanted)
    parts = signs.fold(source[:9999], (1, 2), 3, 64)
    assert np.array_equal(parts, signs.fold(source[:9999].float(), (1, 2), 3, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_add_is_a_copy(path: str, dtype: torch.dtype) -> None:
    source = random(1000, 6).to(dtype)
    for new in (torch.zeros_like(source), torch.zeros_like(source)):
        signs.add(new, (0, 0), 3, [], source)
        assert torch.equal(new, source)
        signs.replay(new, 3, [], source)
    empty = torch.zeros(0, dtype=dtype)
    signs.add(empty, (0, 0), 3, [(1, 1.0)])
    assert signs.fold(empty, (0, 0), 3, 4).tolist() == [0.0] * 4


def test_trained_and_inference_tensors(path: str) -> None:
    plain = torch.zeros(300)
    signs.add(plain, (1, 1), 0, [(2, 1.0)])
    trained = torch.nn.Parameter(torch.zeros(300))
    signs.add(trained, (1, 1), 0, [(2, 1.0)])
    assert torch.equal(trained, plain)
    for dtype in DTYPES:
        with torch.inference_mode():
            inferred = torch.zeros(300, dtype=dtype)
        signs.add(inferred, (1, 1), 0, [(2, 1.0)])
        assert torch.equal(inferred.float(), plain)


def test_other_devices_take_the_torch_path() -> None:
    """A tensor without storage fails if any step were to run on the CPU."""
    for dtype in DTYPES:
        out = torch.zeros(5, 7, dtype=dtype, device="meta")
        signs.add(out, (1, 2), 3, [(70, 0.5)])
        signs.replay(out, 3, [((1, 2), np.ones(4, dtype=np.float32))], torch.zeros_like(out))
        assert (out.device.type, out.shape, out.dtype) == ("meta", (5, 7), dtype)


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_directions_are_orthogonal_inside_full_blocks(size: int) -> None:
    for start in (0, 5 * size):
        z = np.stack([signs.signs((3, 4), start, start + size, k) for k in range(size)])
        assert np.array_equal(z @ z.T, size * np.eye(size))
    z = signs.signs((3, 4), 0, 1000, 77)
    assert z @ z == 1000
    assert abs(signs.signs((3, 4), 0, 100_000).mean()) < 0.02  # six deviations


def test_one_transform_replays_the_whole_pool(path: str) -> None:
    """As many directions built one at a time, in fp64; the last block is cut."""
    size, count, offset, key, scale = 256, 3000, 777, (11, 12), -0.01
    a = np.random.default_rng(7).standard_normal(size).astype(np.float32)
    z = np.stack([signs.signs(key, offset, offset + count, k) for k in range(size)])
    direct = a.astype(np.float64) @ z.astype(np.float64)
    v = signs.fwht(a)
    index = np.arange(offset, offset + count)
    fast = signs.signs(key, offset, offset + count) * v[index % size]
    assert np.abs(fast - direct).max() <= 1e-12 * np.abs(direct).max()
    weights = random(count, 8)
    wanted = weights.double().numpy() + scale * direct
    signs.replay(weights, offset, [(key, (scale * v).astype(np.float32))])
    assert np.abs(weights.numpy() - wanted).max() <= 2**-22 * np.abs(wanted).max()


@pytest.mark.parametrize("size", [1, 64, 8192])
def test_a_folded_vector_gives_all_products(path: str, size: int) -> None:
    x, key, offset = random(20_000, 9), (5, 6), 999
    products = signs.fwht(signs.fold(x, key, offset, size))
    for k in {0, size // 3, size - 1}:
        direct = (
            signs.signs(key, offset, offset + 20_000, k).astype(np.float64) @ x.double().numpy()
        )
        assert abs(products[k] - direct) < 1e-9


@given(st.integers(0, 8), st.integers(0, 1000))
def test_the_transform_is_its_own_inverse(power: int, seed: int) -> None:
    a = np.random.default_rng(seed).integers(-99, 99, 1 << power)
    assert np.array_equal(signs.fwht(signs.fwht(a)), float(1 << power) * a)


def test_choices_cover_the_pool_and_go_on() -> None:
    drawn = signs.choices(4, 2000, 8)
    assert set(drawn.tolist()) == set(range(8))
    assert drawn.dtype == np.int64
    assert signs.choices(4, 7, 8).tolist() == drawn[:7].tolist()
    assert signs.choices(4, 0, 8).size == 0


# --- the compiled kernel --------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_portable_branches_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C99 without 128-bit integers and clones, as other compilers and processors see it."""
    library = tmp_path / "_signs.so"
    flags = "-std=c99 -Wall -Wextra -Werror -pedantic -O1 -DCLONES= -U__SIZEOF_INT128__"
    subprocess.run(
        ["cc", *flags.split(), "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True
    )
    x, key = random(9000, 10), (2, 3)
    wanted, sums = x.clone(), signs.fold(x, key, 100, 64)
    signs.add(wanted, key, 100, [(1234, 0.3), (7, 0.1)])
    monkeypatch.setattr(signs, "__file__", str(tmp_path / "signs.py"))
    monkeypatch.setattr(signs, "_kernel", signs._load())
    assert signs.compiled()
    counter, keys, answer = KNOWN[2]
    assert tuple(signs._c_philox(counter, keys, 1).tolist()) == answer
    assert np.array_equal(signs.fold(x, key, 100, 64), sums)
    signs.add(x, key, 100, [(1234, 0.3), (7, 0.1)])
    assert torch.equal(x, wanted)


def test_a_kernel_that_does_not_load_or_differs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "__file__", str(tmp_path / "signs.py"))
    before = signs._kernel
    assert signs._load() is None
    (tmp_path / "_signs.so").write_bytes(b"not a library")
    assert signs._load() is None
    if KERNEL is not None:
        shutil.copy(str(KERNEL._name), tmp_path / "_signs.so")
        assert signs._load() is not None
        monkeypatch.setattr(signs, "_c_add", lambda out, *_: out.zero_())
        assert signs._load() is None
    assert signs._kernel is before


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 12, 131072, -4])
def test_a_pool_has_a_power_of_two_of_directions(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        signs.choices(0, 3, size)
    with pytest.raises(ValueError, match=f"not {size}"):
        signs.fold(torch.zeros(3), (0, 0), 0, size)
    if size > 0:
        with pytest.raises(ValueError, match=f"not {size}"):
            signs.replay(torch.zeros(3), 0, [((0, 0), np.zeros(size, dtype=np.float32))])


@pytest.mark.parametrize("a", [np.zeros(0), np.zeros(6), np.zeros((2, 2))])
def test_a_transform_needs_a_power_of_two(a: Any) -> None:
    with pytest.raises(ValueError, match="Walsh"):
        signs.fwht(a)


@pytest.mark.parametrize("k", [-1, 65536])
def test_directions_have_a_range(k: int) -> None:
    with pytest.raises(ValueError, match=str(k)):
        signs.signs((0, 0), 0, 1, k)
    with pytest.raises(ValueError, match=str(k)):
        signs.add(torch.zeros(3), (0, 0), 0, [(k, 1.0)])


@pytest.mark.parametrize("key", [(-1, 0), (0, 1 << 64)])
def test_keys_have_64_bits(key: signs.Key) -> None:
    calls: list[Any] = [
        lambda: signs.words(key, 0, 1),
        lambda: signs.signs(key, 0, 1),
        lambda: signs.add(torch.zeros(3), key, 0, []),
        lambda: signs.fold(torch.zeros(3), key, 0, 4),
        lambda: signs.replay(torch.zeros(3), 0, [(key, np.zeros(4, dtype=np.float32))]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="key"):
            call()


def test_ranges() -> None:
    calls: list[Any] = [
        lambda: signs.words((0, 0), -1, 1),
        lambda: signs.words((0, 0), 0, 1, stream=1 << 64),
        lambda: signs.signs((0, 0), 4, 3),
        lambda: signs.signs((0, 0), -1, 3),
        lambda: signs.add(torch.zeros(3), (0, 0), -1, []),
        lambda: signs.replay(torch.zeros(3), -1, []),
        lambda: signs.fold(torch.zeros(3), (0, 0), 2**63 - 2, 4),
        lambda: signs.choices(0, -1, 4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no "):
            call()


def test_tensors_are_contiguous_and_of_a_known_type() -> None:
    good = torch.zeros(4, 4)
    for bad, text in (
        (torch.zeros(4, 4).T[:2], "contiguous"),
        (torch.zeros(4, 4, dtype=torch.float64), "float64"),
        (torch.zeros(4, 4, dtype=torch.int32), "int32"),
    ):
        for call in (
            lambda bad=bad: signs.add(bad, (0, 0), 0, []),
            lambda bad=bad: signs.add(good, (0, 0), 0, [], bad),
            lambda bad=bad: signs.replay(bad, 0, []),
            lambda bad=bad: signs.fold(bad, (0, 0), 0, 4),
        ):
            with pytest.raises(ValueError, match=text):
                call()
    for other in (torch.zeros(16), good.half(), good.to("meta")):
        with pytest.raises(ValueError, match="source is"):
            signs.add(good, (0, 0), 0, [], other)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_values_are_finite_in_fp32(scale: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        signs.add(torch.zeros(3), (0, 0), 0, [(1, scale)])
    with np.errstate(over="ignore"):
        v = np.array([1, scale]).astype(np.float32)
    with pytest.raises(ValueError, match="finite"):
        signs.replay(torch.zeros(3), 0, [((0, 0), v)])


def test_logs_are_rows_of_fp32() -> None:
    wrong: list[Any] = [np.zeros(4), np.zeros((2, 2), dtype=np.float32)]
    for v in wrong:
        with pytest.raises(ValueError, match="one row of fp32"):
            signs.replay(torch.zeros(3), 0, [((0, 0), v)])


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
