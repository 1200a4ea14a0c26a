"""Bytes that a device's owner lets runs keep on its disk, asked before a file is written.

A file counts with its bytes rounded up to blocks of 4 KiB: a million small ones fill a disk too.
Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import DiskLimitError
from corolla.host.text import human_bytes

_BLOCK = 4096


@dataclass(frozen=True)
class DiskLimits:
    """Bytes that one run may keep, and that all runs may keep together with a gateway's files."""

    run: int = 2_000_000_000
    whole: int = 8_000_000_000

    @property
    def beside(self) -> int:
        """Bytes that are left for all else while one run takes all that it may."""
        return self.whole - self.run

    def check_run(self, size: int) -> None:
        """Raises DiskLimitError for a run that would keep so many bytes."""
        if size > self.run:
            raise DiskLimitError(
                f"the run would keep {human_bytes(size)} on this device's disk, its owner allows "
                f"{human_bytes(self.run)} (--run-disk)"
            )

    def check_beside(self, what: str, size: int) -> None:
        """Raises DiskLimitError for a gateway's files of so many bytes."""
        if size > self.beside:
            raise DiskLimitError(
                f"{what} has {human_bytes(size)}, the owner of this device allows "
                f"{human_bytes(self.beside)} (--disk, without --run-disk)"
            )


USUAL = DiskLimits()
"""The limits of an owner who says nothing."""


class Room:
    """The room that one run has below its folder, while one process at a time writes there."""

    def __init__(self, folder: Path, limits: DiskLimits) -> None:
        self._folder, self._limits = folder, limits
        self._held = held(folder)

    def ask(self, coming: int) -> None:
        """Raises DiskLimitError where a file of so many bytes would be too much."""
        self._limits.check_run(self._held + blocks(coming))

    def wrote(self, path: Path) -> None:
        """A file that was not there has been written."""
        self._held += blocks(path.stat().st_size)

    def drop(self, path: Path) -> None:
        """Delete a file, if it is there."""
        size = held(path)
        path.unlink(missing_ok=True)
        self._held -= size

    def settle(self) -> None:
        """Count anew, after files were written that `wrote` was not told of."""
        self._held = held(self._folder)


def blocks(size: int) -> int:
    """Bytes of whole blocks that a file takes."""
    return -(-size // _BLOCK) * _BLOCK


def held(path: Path) -> int:
    """Bytes of all files in a folder, or of one file; 0 where there is none."""
    return sum(blocks(size) for size in _sizes(path))


def _sizes(path: Path) -> Iterable[int]:
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    for file in found:
        try:
            if file.is_file():
                yield file.lstat().st_size
        except OSError:  # it has just been deleted
            continue
