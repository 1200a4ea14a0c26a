"""Tensors in safetensors files: read in parts, written one after the other, never all in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corolla.errors import ModelError

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Number types of safetensors that stand for numbers with a floating point."""
_BLOCK = 1 << 20
"""Values that are read from a file at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, read in parts and never mapped into memory."""

    path: Path
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self, start: int, stop: int) -> Tensor:
        """Values start … stop of the flattened tensor, as stored.

        Raises ModelError where the file has changed.
        """
        width = self.dtype.itemsize
        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * width, offset=self.at + start * width
        )
        if len(raw) != (stop - start) * width:
            raise ModelError(f"{self.path} is not the file any more that the model was loaded from")
        return torch.from_numpy(raw).view(self.dtype)

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the tensor in parts of about a million values, as stored.

        A row is what the first dimension counts; a scalar is one row.
        """
        count, shape = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        width = self.count // max(1, count)
        step = max(1, _BLOCK // max(1, width))
        for first in range(0, count, step):
            last = min(first + step, count)
            flat = self.read(first * width, last * width)
            yield first, flat.reshape(last - first, *shape) if self.shape else flat.reshape(())


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors with a floating point of one safetensors file, by name.

    Empty for a damaged file, which no model was loaded from.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError:
            return {}
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in TYPES:
            at = 8 + length + entry["data_offsets"][0]
            found[name] = StoredTensor(path, at, TYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def write_stored(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    parts: Iterable[Tensor],
) -> None:
    """Write a safetensors file from the values of its tensors, in the order of `shapes`.

    `parts` are pieces of them, each of any length; memory is that of one piece.
    """
    code = next(name for name, own in TYPES.items() if own == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            values = part.to(dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + at:
            raise ValueError(f"{path}: {at} bytes of tensors were announced")
