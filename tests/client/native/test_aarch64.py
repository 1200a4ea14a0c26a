"""The arithmetic of the native client on 64-bit ARM: cross-compiled, run under emulation."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from corolla.directions import moving
from corolla.directions.pools import SignPool
from corolla.tensors import tree
from corolla.types import Move
from corolla.wire import codec
from tests.client.native.conftest import ROOT, SOURCES, quiet

LIBRARIES = Path("/usr/aarch64-linux-gnu")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of corolla-native-check for aarch64."""
    tools = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        pytest.skip(f"nothing is run on aarch64: no {', '.join(missing)} here")
    folder = tmp_path_factory.mktemp("aarch64")
    quiet("cmake", "-S", SOURCES, "-B", folder, "-DCOROLLA_ENGINE=OFF",
          f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}")  # fmt: skip
    quiet("cmake", "--build", folder, "-j", "2")
    return ["qemu-aarch64", "-L", str(LIBRARIES), str(folder / "corolla-native-check")]


def said(command: list[str], *words: object) -> str:
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_vectors_of_the_sign_stream(arm: list[str], tmp_path: Path) -> None:
    vectors = ROOT / "proto" / "signs-v1.json"
    said(arm, "vectors", vectors)
    said(arm, "self")
    wrong = json.loads(vectors.read_text())
    wrong["choices"][-1]["choices"][0] += 1
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    done = subprocess.run(
        [*arm, "vectors", str(tmp_path / "wrong.json")], capture_output=True, check=False
    )
    assert done.returncode == 1


def test_a_replay_of_three_rounds_has_the_bits_of_python(arm: list[str], tmp_path: Path) -> None:
    size, seed, generator = 64, 7, torch.Generator().manual_seed(0)
    expected = torch.randn(10_007, generator=generator)
    tensors = {"w": expected.clone()}
    moves = []
    for number in (1, 2, 3):
        tensors[f"row-{number}"] = sums = torch.randn(size, generator=generator)
        moves.append(Move(SignPool(size, (seed, number)), sums, 1.0))
    moving.apply(expected, 0, moves)
    codec.write(str(tmp_path / "rows"), tensors)
    said(arm, "replay", tmp_path / "rows", tmp_path / "out", size, seed, 1)
    assert tree.digest(codec.read(str(tmp_path / "out"))[0]) == tree.digest({"w": expected})
