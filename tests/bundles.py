"""The embedded model as a bundle: compiled once for all tests, since that takes minutes.

It is kept in build/ under a name made of all that it depends on, so that the next run of the tests
finds it. Workers of pytest-xdist wait for the one that makes it.
"""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from filelock import FileLock

from corolla.embedded.assets import asset
from corolla.phones import bundle, export

ROOT = Path(__file__).resolve().parent.parent
RANK, LENGTH = 8, 128
SOURCES = (
    *("phones/bundle", "phones/export", "phones/lowering", "phones/selftest"),
    *("models/lora", "models/pretrained"),
)
LIBRARIES = ("executorch", "torchao", "torch", "transformers", "peft")

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="needs pip install 'corolla[phones]'"
)


def embedded_bundle() -> tuple[Path, Path]:
    """(folder of the bundle, public key of its publisher); rank 8, 128 tokens, fp32 and q4."""
    pytest.importorskip("executorch", reason="needs pip install 'corolla[phones]'")
    home = ROOT / "build" / "bundles" / _state()
    home.mkdir(parents=True, exist_ok=True)
    folder, key = home / "embedded", home / "publisher.key"
    with FileLock(home / "lock"):
        if not (folder / bundle.MANIFEST).is_file():
            export.make("embedded", folder, key, rank=RANK, length=LENGTH)
    return folder, key.with_suffix(".pub")


def _state() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    digest = hashlib.sha256(" ".join(versions).encode())
    files = [ROOT / "corolla" / f"{name}.py" for name in SOURCES]
    for path in [*files, asset("model") / "model.safetensors"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
