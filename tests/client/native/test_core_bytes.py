"""What a gateway sends is counted before the native client builds anything of it.

An empty entry of a repeated field takes 2 bytes on the wire and up to 100 once it is parsed.
"""

import json
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2 as updates
from corolla.server.rounds.tasks import run_settings
from experiments.bench import fuzz_native
from tests.client.native.core_tasks import call, config

MOST = 64_000_000
"""Bytes that reading may take."""
MIB = 1 << 20


@pytest.fixture(scope="session")
def check(native_build: Path) -> Path:
    return native_build / "corolla-native-check"


def told(check: Path, folder: Path, kind: str, cases: Sequence[bytes]) -> dict[str, Any]:
    """What the parser of the client makes of them."""
    file = folder / "cases"
    with file.open("wb") as out:
        for case in cases:
            out.write(struct.pack("<I", len(case)) + case)
    done = subprocess.run([check, "read", kind, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def entries(kind: Any, field: str, size: int) -> bytes:
    """Empty entries of a field, `size` bytes of them."""
    return bytes([kind.DESCRIPTOR.fields_by_name[field].number << 3 | 2, 0]) * (size // 2)


def within(data: bytes, number: int) -> bytes:
    """A message in a field of another."""
    size, length = len(data), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


LOG = updates.Task.DESCRIPTOR.fields_by_name["log"].number
LEASE = pb.CheckInResponse.DESCRIPTOR.fields_by_name["lease"].number
FILES, CACHED = entries(pb.Manifest, "files", 8 * MIB), entries(updates.Task, "cached", 8 * MIB)
BOMBS = {
    "files of a bundle": ("files", FILES, "more than 1024 files"),
    "after a group": ("files", b"\x0b\x0c" + FILES, "cannot be parsed"),
    "tags of more bits": ("files", b"\x8a\x80\x80\x80\x10\x00" * MIB, "more than 1024 files"),
    "cached groups": ("task", CACHED, "more than 4096 cached groups"),
    "scalars": ("task", entries(updates.Task, "scalars", 8 * MIB), "64 groups of scalars"),
    "rows": ("task", within(entries(updates.Log, "rows", 8 * MIB), LOG), "65536 rows of a log"),
    "rows in parts": (
        "task",
        within(entries(updates.Log, "rows", 60_000), LOG) * 100,
        "65536 rows of a log",
    ),
    "groups of a lease": (
        "answer",
        within(entries(pb.Lease, "cached", 2 * MIB), LEASE),
        "more than 4096 cached groups",
    ),
    "values of settings": ("settings", b"[" + b"{},[]," * MIB + b"1]", "too many values"),
    "values of a manifest": ("manifest", b"[" + b"[[]]," * MIB + b"1]", "too many values"),
    "values of tensors": (
        "payload",
        struct.pack("<Q", 6 * MIB) + b'{"a":[],' * (6 * MIB // 8),
        "too many values",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_message_of_many_entries_takes_no_memory(check: Path, tmp_path: Path, name: str) -> None:
    kind, data, why = BOMBS[name]
    found = told(check, tmp_path, kind, [data])
    assert (found["read"], found["refused"], found["escaped"]) == (0, 1, [])
    assert why in found["why"]
    assert found["grown"] < 8_000_000


def test_as_many_entries_as_are_allowed_are_read_in_little_memory(
    check: Path, tmp_path: Path
) -> None:
    task = updates.Task(run_id="ab" * 16)
    most = task.SerializeToString() + CACHED[: 2 * 4096] + entries(updates.Task, "scalars", 128)
    most += within(entries(updates.Log, "rows", 2 * 65536), LOG)
    found = told(check, tmp_path, "task", [most])
    assert (found["read"], found["escaped"]) == (1, [])
    assert found["grown"] < MOST


def test_steps_that_a_server_asks_for_are_not_laid_out_at_once(check: Path, tmp_path: Path) -> None:
    """Ten thousand steps on all of 2,000 sequences: they would be 80 MB of numbers."""
    run = config(micro_batch_size=None, local_steps=10_000, batch_size=2_000)
    work = {"run": run_settings(run, True), "sequences": 2_000, "seed": 1}
    (tmp_path / "told").write_text(json.dumps(work))
    found = json.loads(call(check, "walk", tmp_path / "told").stdout)
    assert (found["steps"], found["sequences"]) == (10_000, 20_000_000)
    assert found["grown"] < 8_000_000


@pytest.mark.parametrize("kind", fuzz_native.kinds())
def test_mutated_messages_are_read_or_refused_in_little_memory(check: Path, kind: str) -> None:
    """With those of tests/experiments/test_bench_fuzz.py these are 20,000."""
    found = fuzz_native.examine(check.parent, kind, 0, 560)
    assert found.escaped == []
    assert found.read + found.refused == 560
    assert found.read > 20
    assert found.grown <= MOST


def test_a_peers_text_makes_no_second_line(check: Path, tmp_path: Path) -> None:
    (settings, _) = fuzz_native.kinds()["settings"]
    odd = {**json.loads(settings), "class": "other\n\ttwo"}
    found = told(check, tmp_path, "settings", [json.dumps(odd).encode()])
    assert (found["refused"], found["escaped"]) == (1, [])
