"""An aggregator for two classes of clients: some send tensors, some send scalars."""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from corolla.aggregation.sums import summed, summed_like, terms
from corolla.directions import seedlog
from corolla.tensors import tree
from corolla.types import Params, Payload

_ROUNDING = 1e-6


class TwoMeans:
    """Σ n u, Σ n, Σ n², Σ n |u|² and how many clients there are, for each of the two classes.

    Zeroth-order updates stay sums of scalars: a client costs no pass over the weights here.
    """

    linear = True

    def __init__(self, size: int) -> None:
        self._dense: dict[str, Tensor] = {}
        self._sums = torch.zeros(size, dtype=torch.float64)
        # Examples, clients, squares of the updates, squares of the examples.
        self._counts = torch.zeros(4, 2, dtype=torch.float64)

    def add(self, payload: Payload, weight: float) -> None:
        if "adapter" in payload:
            square = tree.norm(payload["adapter"]) ** 2
            for name, tensor in payload["adapter"].items():
                self._dense[name] = self._dense.get(name, 0) + tensor.double() * weight
            self._count(0, weight, square)
            return
        scalars = payload["scalars"]
        own = torch.zeros_like(self._sums)
        values = scalars["scalars"].double() * float(scalars["step"])
        own.index_add_(0, seedlog.directions(scalars, len(own)), values)
        self._sums += weight * own
        self._count(1, weight, float(own.square().sum()))

    def _count(self, which: int, weight: float, square: float) -> None:
        """In fp64: n² of a client of millions of examples has more digits than fp32."""
        own = [weight, 1, weight * square, weight**2]
        self._counts[:, which] += torch.tensor(own, dtype=torch.float64)

    def merge(self, other: Self) -> None:
        for name, tensor in other._dense.items():
            self._dense[name] = self._dense.get(name, 0) + tensor
        self._sums += other._sums
        self._counts += other._counts

    def sums(self) -> Payload:
        """Of the classes that were seen."""
        first, zeroth = (bool(clients) for clients in self._counts[1])
        return summed(
            {
                **({"adapter": self._dense} if first else {}),
                **({"scalars": {"directions": self._sums}} if zeroth else {}),
                "counts": {"counts": self._counts},
            }
        )

    def sums_like(self, like: Payload) -> Payload:
        first = {"adapter": like["adapter"]} if "adapter" in like else {}
        zeroth = {"scalars": {"directions": self._sums}} if "scalars" in like else {}
        return summed_like({**first, **zeroth, "counts": {"counts": self._counts}})

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        own = terms(sums)
        counts = own["counts"]["counts"]
        _check(counts, [own.get(group) for group in ("adapter", "scalars")], weight)
        for name, tensor in own.get("adapter", {}).items():
            self._dense[name] = self._dense.get(name, 0) + tensor
        if "scalars" in own:
            self._sums += own["scalars"]["directions"]
        self._counts += counts

    def tally(self, sums: Payload) -> Mapping[str, tuple[float, float]]:
        examples, clients, _, _ = terms(sums)["counts"]["counts"].tolist()
        return {"adapter": (examples[0], clients[0]), "scalars": (examples[1], clients[1])}

    def finalise(self) -> Payload:
        examples, clients, squares, own = self._counts
        if not float(examples.sum()) > 0:
            raise ValueError("nothing to average: the weights sum to 0")
        per = examples.clamp(min=1e-300)
        return {
            "adapter": {name: tensor / per[0] for name, tensor in self._dense.items()},
            "scalars": {"scalars": self._sums / per[1]},
            "counts": {
                "examples": examples,
                "clients": clients,
                "squares": squares / per,
                "shares": own / per**2,
            },
        }


class Spread:
    """Client → (share of all examples, update) of one class."""

    def __init__(self) -> None:
        self.clients: dict[str, tuple[float, Tensor]] = {}

    @property
    def total(self) -> float:
        return sum(p for p, _ in self.clients.values())

    @property
    def precision(self) -> float:
        """|ū|² / v with v = s² Σp² / (1 - Σp²), s² = Σ p |u - ū|²; NaN of fewer than two."""
        if len(self.clients) < 2:
            return math.nan
        own = [(p / self.total, u) for p, u in self.clients.values()]
        mean = torch.stack([p * u for p, u in own]).sum(0)
        spread = sum(p * float((u - mean).square().sum()) for p, u in own)
        squares = sum(p * p for p, _ in own)
        variance = spread * squares / (1 - squares)
        return float(mean.square().sum()) / variance if variance > 0 else math.nan


def _check(counts: Tensor, sums: Sequence[Params | None], weight: float) -> None:
    """Raises ValueError for counts (4, 2) that no updates with these sums and this weight have.

    A class of which nobody was seen has no sums (None).
    """
    examples, clients, squares, own = counts
    norms = torch.tensor([tree.norm(part or {}) ** 2 for part in sums], dtype=torch.float64)
    most = examples.square()
    if not (
        bool((counts >= 0).all())
        and (clients > 0).tolist() == [part is not None for part in sums]
        and float(examples.sum()) == weight
        and bool((clients == clients.round()).all() and (clients <= examples).all())
        # By Cauchy and Schwarz, up to rounding: Σ n² ≥ (Σ n)² / M, and Σ n · Σ n|u|² ≥ |Σ n u|².
        and bool(((own <= most) & (own * clients >= most * (1 - _ROUNDING))).all())
        and bool((squares * examples >= norms * (1 - _ROUNDING)).all())
    ):
        raise ValueError("partial aggregate has counts that no updates have")
