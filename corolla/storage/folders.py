"""Names of folders: one for each client, one for each round."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:  # it loads transformers, which a gateway has no use for
    pass


def client_folder(folder: Path, client: str) -> Path:
    """The folder of a client in a round's folder: any name becomes one file name of its own."""
    name = quote(client, safe=" ()").replace(".", "%2E") or "%"
    if len(name) > 120:  # file systems allow 255 bytes
        name = f"{name[:80]}~{hashlib.sha256(client.encode()).hexdigest()[:32]}"
    return folder / name


def round_folder(folder: Path, round: int) -> Path:
    """`round-001` and so on."""
    return folder / f"round-{round:03d}"
