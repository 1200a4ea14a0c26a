"""A smaller adapter beside the exact one, of a rank that servers of models take."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corolla.artefacts.adapters import TENSORS, SavedLora, cut, read_lora, write_lora
from corolla.artefacts.sizes import SERVED
from corolla.types import Adapter, Metrics


@dataclass(frozen=True)
class Served:
    """The best adapter of rank at most `served_rank`, and what it lost."""

    exact_rank: int
    exact_bytes: int
    """Of the tensors of adapter/."""
    loss: float
    """Held out, of what is served; that of the exact one where nothing is cut."""
    error: float = 0.0
    """‖exact - served‖_F / ‖exact‖_F of effective weights."""
    small: SavedLora | None = None
    """None: the exact one is small enough and is served itself."""
    small_bytes: int = 0
    """Bytes of the tensors of served/, once they are written."""

    @property
    def rank(self) -> int:
        """The rank of what is served."""
        return self.small.spec.rank if self.small else self.exact_rank

    def to_json(self, exact: float) -> dict[str, Any]:
        """The object of run.json; `exact` is the held-out loss of adapter/."""
        return {
            "folder": SERVED if self.small else "adapter",
            "rank": self.rank,
            "bytes": self.small_bytes if self.small else self.exact_bytes,
            "error": self.error,
            "loss": self.loss,
            "exact": {"rank": self.exact_rank, "bytes": self.exact_bytes, "loss": exact},
        }


def prepare(folder: Path, rank: int, loss: float, score: Callable[[Adapter], Metrics]) -> Served:
    """Returns the served form of a saved adapter, of rank at most `rank`, and its held-out loss.

    The truncated SVD of each module's update, from its factors in fp64. `loss` is that of the exact
    adapter, `score` measures another one.
    """
    exact = read_lora(folder)
    size = (folder / TENSORS).stat().st_size
    small, error = cut(exact, rank)
    if small is exact:
        return Served(exact.spec.rank, size, loss)
    found = score(Adapter(dict(small.heads), (small.baked,)))
    return Served(exact.spec.rank, size, found["loss"], error, small)


def write(served: Served, folder: Path, exact: Path, base: str) -> Served:
    """Write `folder`/served beside the adapter folder `exact`; nothing where that one is served.

    Returns the same with the bytes that were written.
    """
    shutil.rmtree(folder / SERVED, ignore_errors=True)
    if not served.small:
        return served
    write_lora(folder / SERVED, served.small, exact, base)
    return replace(served, small_bytes=(folder / SERVED / TENSORS).stat().st_size)
