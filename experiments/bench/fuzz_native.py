"""What a gateway sends to native phones, mutated, and the parsers of the C++ client that read it.

The cases go through a file to `corolla-native-check read`, which tells what was read, what was
refused, what escaped, and how far the process grew.
"""

import hashlib
import json
import random
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from corolla.config.run import RunConfig
from corolla.phones import protocol
from corolla.proto import device_pb2 as device
from corolla.proto import update_pb2 as update
from corolla.server.rounds.tasks import run_settings
from corolla.wire import codec
from experiments.bench import mutations

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Found:
    """What the parser made of its cases."""

    read: int
    refused: int
    escaped: list[str]
    grown: int
    """Bytes by which the process grew while it read them, at most."""


def kinds() -> Mapping[str, tuple[bytes, Mutate]]:
    """Name of a parser → (valid bytes, how they are mutated)."""
    blob = device.Blob(sha256="12" * 32, size=5, group="A", content="34" * 16)
    lease = device.Lease(id="ab" * 16, cached=[blob, blob], seconds=5.0, strategy="fedavg")
    lease.assignment.CopyFrom(device.Assignment(program="fp32", method="grad", rank=8))
    scalars = update.Scalars(group="scalars", size=16, fp16=bytes(6), varint=b"\x01\x02\x03")
    dense = update.Scalars(size=4, fp32=bytes(16), fixed32=bytes(16), seed=7, step=0.5)
    task = update.Task(schema=3, run_id="ab" * 16, round=3, scalars=[scalars, dense])
    task.cached.add(group="A", id="34" * 16)
    task.log.CopyFrom(update.Log(origin="1" * 32, rows=[dense, dense], number=2))
    files = device.Manifest()
    for name in ("manifest.json", "base.ptd"):
        files.files.add(path=name, blob=blob, chunks=bytes(32))
    payload = codec.encode({"A": {"w": torch.ones(3)}, "B": {"w": torch.ones(2, 2)}})
    lora = {"rank": 8, "alpha": 16.0, "rslora": False}
    settings = {"lora": lora, "class": "", "run": run_settings(RunConfig(), True)}

    def like(kind: type) -> Mutate:
        return lambda rng, data: mutations.message(rng, data, kind)

    def text(rng: random.Random, data: bytes) -> bytes:
        return mutations.settings(rng, data.decode(errors="replace")).encode(errors="replace")

    answer = device.CheckInResponse(lease=lease, retry=protocol.window(1, 2))
    word = device.Acknowledgement(accepted=True, retry=protocol.window(1, 2))
    return {
        "answer": (answer.SerializeToString(), like(device.CheckInResponse)),
        "task": (task.SerializeToString(), like(update.Task)),
        "files": (files.SerializeToString(), like(device.Manifest)),
        "chunk": (protocol.chunk(b"x" * 50, 0, 50).SerializeToString(), like(device.Chunk)),
        "acknowledgement": (word.SerializeToString(), like(device.Acknowledgement)),
        "scalars": (scalars.SerializeToString(), like(update.Scalars)),
        "payload": (payload, mutations.payload),
        "manifest": (
            json.dumps({**manifest({"fp32.pte": b"123456789"}), "serial": 5}).encode(),
            text,
        ),
        "settings": (json.dumps(settings).encode(), text),
    }


def manifest(files: Mapping[str, bytes]) -> dict[str, object]:
    """The manifest of a bundle whose one program, of a made-up model, has these files."""
    method = {"file": "fp32.pte", "planned": {"32": 1000}}
    program = {"name": "fp32", "base": "fp32", "files": sorted(files), "eps": [1e-4, 1e-2]}
    return {
        "version": 1,
        "model": "made-up",
        "model_sha256": "ab" * 32,
        "signs": 1,
        "executorch": "1.5.1",
        "executorch_min": "1.5.0",
        "rank": 1,
        "targets": ["m"],
        "vocab": 9,
        "length": 32,
        "tokenizer": {"files": [], "eos": 0, "pad": 1, "bos": None},
        "adapter": [{"name": "m.lora_A", "shape": [1, 2]}, {"name": "m.lora_B", "shape": [2, 1]}],
        "programs": [{**program, "methods": {"loss": method, "grad": method}}],
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in files.items()
        },
    }


def examine(build: Path, name: str, first: int, count: int) -> Found:
    """Has so many cases of a parser read. Raises AssertionError where its process ends."""
    data, change = kinds()[name]
    with tempfile.NamedTemporaryFile() as file:
        for number in range(first, first + count):
            rng = random.Random(f"native {name} {number}")
            case = change(rng, data) if rng.random() < 0.8 else mutations.raw(rng, data)
            file.write(struct.pack("<I", len(case)) + case)
        file.flush()
        command = [str(build / "corolla-native-check"), "read", name, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: code {done.returncode}, {done.stderr[-300:]}"
    told = json.loads(done.stdout)
    return Found(told["read"], told["refused"], told["escaped"], told["grown"])
