"""The bundle of tests, compiled once, which takes a minute.

It is kept in build/ under a name made of all that it depends on, so that the next run of the tests
finds it. Workers of pytest-xdist wait for the one that makes it.
"""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from filelock import FileLock

from corolla.embedded.assets import asset
from corolla.phones import bundle, export

ROOT = Path(__file__).resolve().parent.parent
RANK, LENGTH = 8, 128
SOURCES = ("corolla/phones", "corolla/models")
LIBRARIES = ("executorch", "torchao", "torch", "transformers", "peft")

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="needs pip install 'corolla[phones]'"
)


class Exported(NamedTuple):
    """A bundle of rank 8 for 128 tokens, in fp32 and q4."""

    model: str
    """The folder of what it is the bundle of."""
    folder: Path
    publisher: Path
    """The public key of who has signed it."""


def small_bundle() -> Exported:
    """Of a small model: the embedded one without all layers but the first."""
    pytest.importorskip("executorch", reason="needs pip install 'corolla[phones]'")
    home = ROOT / "build" / "bundles" / _state()
    home.mkdir(parents=True, exist_ok=True)
    model, folder, key = home / "model", home / "bundle", home / "publisher.key"
    with FileLock(home / "lock"):
        if not (folder / bundle.MANIFEST).is_file():
            _write_small_model(model)
            export.make(
                export.ExportRequest(
                    source=str(model), out=folder, key=key, rank=RANK, length=LENGTH
                )
            )
    return Exported(str(model), folder, key.with_suffix(".pub"))


def _write_small_model(folder: Path) -> None:
    source = asset("model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _state() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    digest = hashlib.sha256(" ".join(versions).encode())
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).glob("*.py"))]
    for path in [*files, Path(__file__), asset("model") / "model.safetensors"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
