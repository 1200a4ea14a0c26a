"""An aggregator of scalars along directions that also adds up what was seen of each direction."""

from typing import Self

import torch

from corolla.aggregation.sums import SeedSums, summed, summed_like, terms
from corolla.directions import seedlog
from corolla.types import Params, Payload

_CLIP = 1000.0
_HISTORY = "history"


class SumsAndHistory:
    """The weighted sums of SeedSums, and Σ |clip(g)| and counts of each seed, unweighted."""

    linear = True

    def __init__(self, size: int) -> None:
        self._moved = SeedSums(size)
        self._magnitudes = torch.zeros(size, dtype=torch.float64)
        self._counts = torch.zeros(size, dtype=torch.float64)

    def add(self, payload: Payload, weight: float) -> None:
        self._moved.add(payload, weight)
        scalars = payload["scalars"]
        where = seedlog.directions(scalars, len(self._counts))
        magnitudes = scalars["scalars"].double().abs().clamp(max=_CLIP)
        self._magnitudes.index_add_(0, where, magnitudes)
        self._counts.index_add_(0, where, (magnitudes > 0).double())  # 0: skipped

    def merge(self, other: Self) -> None:
        self._moved.merge(other._moved)
        self._magnitudes += other._magnitudes
        self._counts += other._counts

    def sums(self) -> Payload:
        return {**self._moved.sums(), **summed({_HISTORY: self._history})}

    def sums_like(self, like: Payload) -> Payload:
        return {**self._moved.sums_like(like), **summed_like({_HISTORY: self._history})}

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        magnitudes, counts = (terms(sums)[_HISTORY][name] for name in self._history)
        measured = weight * len(like["scalars"]["scalars"])
        if not (
            bool(((magnitudes >= 0) & (magnitudes <= _CLIP * counts) & (counts >= 0)).all())
            and float(counts.sum()) <= measured
            and bool((counts == counts.round()).all())
        ):
            raise ValueError("partial aggregate has a history that no updates have")
        self._moved.absorb(sums, weight, like)
        self._magnitudes += magnitudes
        self._counts += counts

    @property
    def _history(self) -> Params:
        return {"magnitudes": self._magnitudes, "counts": self._counts}

    def finalise(self) -> Payload:
        return {
            "sums": self._moved.finalise()["scalars"],
            "magnitudes": {"scalars": self._magnitudes},
            "counts": {"scalars": self._counts},
        }
