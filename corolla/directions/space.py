"""The trained tensors of a live model, as a zeroth-order trainer moves them.

A space has a point, where training stands, and shows the model weights at the point plus some
directions. `look` changes what the model shows, `move` changes the point.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from corolla.types import Pool

Terms = Mapping[int, float]
"""Direction → scale."""


class Space(Protocol):
    """d trained values somewhere in a model."""

    def look(self, pool: Pool, terms: Terms) -> None:
        """Show the model weights at the point + Σ_k terms[k] · z_k."""

    def move(self, pool: Pool, terms: Terms) -> None:
        """Move the point by Σ_k terms[k] · z_k. Call `look` before the model is used."""


class Unrounded:
    """A model whose trained tensors are in fp32: no move is lost, no weight is kept twice."""

    drifts = False
    kept_bytes = 0

    def unmoved(self, eps: float) -> float:
        """None of the trained values stay as they are."""
        return 0.0


class Beside:
    """A small vector (LoRA) with its point in a copy: what is shown is always exact.

    Costs the vector once more in memory, and one pass over it per look and per move.
    """

    def __init__(self, shown: Tensor) -> None:
        """`shown`: the flat fp32 vector (d,) that the model's parameters are views of."""
        self.shown = shown
        self.point = shown.clone()

    def look(self, pool: Pool, terms: Terms) -> None:
        pool.add(self.shown, 0, list(terms.items()), source=self.point)

    def move(self, pool: Pool, terms: Terms) -> None:
        pool.add(self.point, 0, list(terms.items()))


class InPlace:
    """All parameters, changed where they are: no copy of the model.

    The directions that are shown are remembered and taken away by the next look, which adds its
    own in the same pass: the update of a step and the perturbation of the next share one. Rounding
    leaves a drift of about half a unit in the last place for each pass, until the tensors are
    restored from the base model (FullModel.settle).
    """

    def __init__(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """`tensors`: (offset in the flat vector, tensor)."""
        self.tensors = tensors
        self._shown: dict[int, float] = {}

    def look(self, pool: Pool, terms: Terms) -> None:
        missing = dict(terms)
        for k, scale in self._shown.items():
            missing[k] = missing.get(k, 0.0) - scale
        # What was there before comes first: the same order however the terms were given.
        changes = [(k, missing[k]) for k in (*self._shown, *terms) if missing.get(k)]
        changes = list(dict(changes).items())
        if changes:
            for offset, tensor in self.tensors:
                pool.add(tensor, offset, changes)
        self._shown = dict(terms)

    def move(self, pool: Pool, terms: Terms) -> None:
        for k, scale in terms.items():
            self._shown[k] = self._shown.get(k, 0.0) - scale
