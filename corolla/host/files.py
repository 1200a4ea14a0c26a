"""Files and folders that are whole or absent, whatever happens while they are written."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens."""
    scratch = path.with_name(path.name + ".part")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to disk; files themselves are synced by who writes them."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
