"""The native sign stream, seeds, digests and half types are Python's to the bit."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla import seeds
from corolla.directions import seedlog, signs
from corolla.tensors import tree
from corolla.types import Params
from corolla.wire import codec
from tests.client.native.core_tasks import call

ROOT = Path(__file__).parents[3]
VECTORS = ROOT / "proto" / "signs-v1.json"


@pytest.fixture(scope="session")
def check(native_build: Path) -> Path:
    return native_build / "corolla-native-check"


def told(check: Path, *command: object) -> str:
    done = call(check, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_vectors_of_the_definition_hold(check: Path) -> None:
    told(check, "vectors", VECTORS)
    told(check, "self")


@pytest.mark.parametrize("kind", ["philox", "signs", "choices", "fwht", "add", "replay"])
def test_a_changed_vector_is_named(check: Path, tmp_path: Path, kind: str) -> None:
    vectors = json.loads(VECTORS.read_text())
    entry = vectors[kind][-1]
    match kind:
        case "philox":
            entry["words"][3] = "0" * 16
        case "signs":
            entry["signs"] = entry["signs"].translate(str.maketrans("+-", "-+"))
        case "choices":
            entry["choices"][-1] ^= 1
        case "fwht":
            entry["v"][0] = "0" * 16
        case _:
            entry["out"][-1] = "7" * len(entry["out"][-1])
    (tmp_path / "vectors.json").write_text(json.dumps(vectors))
    done = call(check, "vectors", tmp_path / "vectors.json")
    assert done.returncode == 1
    assert done.stderr == f"{kind} vector {len(vectors[kind]) - 1} differs\n"


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 2**31) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
)
def test_seeds_are_derived_as_in_python(check: Path, seed: int, purpose: list[int | str]) -> None:
    found = told(check, "derive", json.dumps([seed, *purpose]))
    assert int(found) == seeds.derive(seed, *purpose)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1000])
def test_orders_are_those_of_torch(check: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(4_000_000_007)
    wanted = [torch.randperm(size, generator=generator).tolist() for _ in range(3)]
    lines = told(check, "permutation", 4_000_000_007, size, 3).splitlines()
    assert [json.loads(line) for line in lines] == wanted


def test_half_types_round_to_the_nearest_even_number(check: Path, tmp_path: Path) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32)
    with np.errstate(over="ignore"):
        middles = (exact[:-1] + exact[1:]) / 2  # ties, and the numbers beside them
        drawn = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
        values = np.concatenate(
            [exact, middles, np.nextafter(middles, np.float32(1)), drawn, drawn * 1e-6,
             drawn * 1e4, np.array([65519.9, 65520, 1e30, -1e30, 1e-40], dtype=np.float32),
             np.array([np.inf, -np.inf], dtype=np.float32)]
        )  # fmt: skip
        values.tofile(tmp_path / "values")
        half = values.astype(np.float16)
    found = json.loads(told(check, "half", tmp_path / "values"))
    assert np.array_equal(np.array(found["fp16"], dtype=np.uint16), half.view(np.uint16))
    wide = half.astype(np.float32).view(np.uint32)
    assert np.array_equal(np.array(found["widened"], dtype=np.uint32), wide)
    brain = torch.from_numpy(values).bfloat16().float().numpy().view(np.uint32)
    assert np.array_equal(np.array(found["bf16"], dtype=np.uint32), brain)
    nan = struct.pack("<f", float("nan"))
    (tmp_path / "nan").write_bytes(nan)
    (found,) = json.loads(told(check, "half", tmp_path / "nan"))["fp16"]
    assert np.isnan(np.uint16(found).view(np.float16))


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 111, 127, 128, 129, 256, 5000])
def test_hashes_are_those_of_their_standards(check: Path, tmp_path: Path, size: int) -> None:
    data = bytes(i * 7 % 256 for i in range(size))
    (tmp_path / "data").write_bytes(data)
    for length in (4, 16, 64):
        blake = hashlib.blake2b(data, digest_size=length).hexdigest()
        wanted = f"{hashlib.sha256(data).hexdigest()} {blake} {zlib.crc32(data)}\n"
        assert told(check, "hash", tmp_path / "data", length) == wanted


PARAMS = {
    "b.lora_A": torch.arange(6, dtype=torch.float32).view(2, 3),
    "é": torch.tensor(3, dtype=torch.int64),
    "a": torch.ones(4, dtype=torch.float16),
    "c": torch.zeros(0, 2, dtype=torch.float64),
    "d": torch.ones(1, dtype=torch.bfloat16),
    "e": torch.tensor([1, 2], dtype=torch.int32),
}


def test_digests_and_versions_are_those_of_python(check: Path, tmp_path: Path) -> None:
    file = tmp_path / "tree.safetensors"
    codec.write(str(file), PARAMS, {"round": "3"})
    found = json.loads(told(check, "digest", file))
    assert found["digest"] == tree.digest(PARAMS)
    assert found["content"] == codec.content_id(PARAMS)
    assert found["facts"] == {"round": "3"}
    assert told(check, "after", "ab" * 16, file).strip() == seedlog.after("ab" * 16, PARAMS)
    first = {"start": PARAMS, "key": {"seed": torch.tensor(7)}}
    (tmp_path / "first").write_bytes(codec.encode(first))
    assert told(check, "origin", "cd" * 32, tmp_path / "first").strip() == seedlog.origin(
        "cd" * 32, first
    )


def test_a_log_replays_to_the_same_bits(check: Path, tmp_path: Path) -> None:
    """Three rounds over a vector whose end is inside a word."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(10_001, generator=generator)
    rows: Params = {f"row-{i}": torch.randn(512, generator=generator) * 1e-3 for i in range(3)}
    codec.write(str(tmp_path / "in"), {"w": w, **rows})
    told(check, "replay", tmp_path / "in", tmp_path / "out", 512, 99, 1)
    for number, row in enumerate(rows.values(), start=1):
        signs.replay(w, 0, [((99, number), signs.fwht(row.numpy()).astype(np.float32))])
    found, _ = codec.read(str(tmp_path / "out"))
    assert tree.digest({"w": w}) == tree.digest(found)
