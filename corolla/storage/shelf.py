"""Rows of bytes in a file, with a few numbers of each: what would be too much for memory.

A shelf is a folder of two files: `rows`, the bytes of all rows one after another, and
`numbers.npz`, their lengths and columns of whole numbers, in the narrowest types that hold them.
"""

import os
import threading
import weakref
import zipfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corolla.errors import DataError

_ROWS, _NUMBERS = "rows", "numbers.npz"
_LENGTHS = "lengths"


class Shelf:
    """The rows of a folder, read from disk one at a time, by any number of threads and processes.

    Raises DataError for a folder that is no whole shelf.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with (
                (folder / _NUMBERS).open("rb") as file,
                np.load(file, allow_pickle=False) as found,
            ):
                columns = {name: found[name] for name in found.files}
            self._file = (folder / _ROWS).open("rb", buffering=0)
            lengths = columns.pop(_LENGTHS)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"rows in {folder} are damaged: delete it") from error
        self.columns: Mapping[str, NDArray[np.integer]] = columns
        """Columns by name, each of one whole number a row."""
        weakref.finalize(self, self._file.close)
        self._ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        self._lock = threading.Lock()
        if os.fstat(self._file.fileno()).st_size != (self._ends[-1] if len(self) else 0):
            raise DataError(f"rows in {folder} are damaged: delete it")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> bytes:
        start, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
        if hasattr(os, "pread"):  # a process that was forked from this one shares the file's place
            return os.pread(self._file.fileno(), end - start, start)
        with self._lock:
            self._file.seek(start)
            return self._file.read(end - start)


class Shelving:
    """A shelf that is being written to `folder`, which is there. Raises OSError."""

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._folder = folder
        self._file = (folder / _ROWS).open("xb", buffering=1 << 20)
        self._columns = {name: array("q") for name in (_LENGTHS, *columns)}

    def add(self, row: bytes, numbers: Sequence[int]) -> None:
        """Writes one row, with a number for each of the columns."""
        self._file.write(row)
        for column, number in zip(self._columns.values(), (len(row), *numbers), strict=True):
            column.append(number)

    def close(self) -> None:
        """Writes what is still to be written. A shelf that is left without this is none."""
        self._file.close()
        with zipfile.ZipFile(self._folder / _NUMBERS, "w") as archive:
            for name, column in self._columns.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.save(file, _narrowed(column), allow_pickle=False)


def _narrowed(column: "array[int]") -> NDArray[np.integer]:
    """The numbers of a column in the narrowest type that holds them."""
    wide = np.array(column, np.int64)
    least, most = int(wide.min(initial=0)), int(wide.max(initial=0))
    return wide.astype(np.min_scalar_type(most if least >= 0 else min(least, -most - 1)))
