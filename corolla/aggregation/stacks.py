"""Aggregators that concatenate the factors of LoRA: exact sums of products."""

from collections.abc import Sequence
from typing import Self

from corolla.aggregation.sums import WeightedMean
from corolla.tensors import factors
from corolla.types import Params, Payload


class Stack:
    """Concatenates factors so that the product of the result is Σ p_m B_m A_m, exactly.

    p_m = w_m / Σ w goes into A alone. A module that a client leaves out has a product of zero.
    Keeps every client's factors: individual updates are visible to the server and to every
    receiver of the result, so secure sums do not apply.
    """

    linear = False

    def __init__(self) -> None:
        self._parts: list[tuple[Payload, float]] = []

    def add(self, payload: Payload, weight: float) -> None:
        self._parts.append((payload, weight))

    def merge(self, other: Self) -> None:
        self._parts.extend(other._parts)

    def finalise(self) -> Payload:
        total = sum(weight for _, weight in self._parts)
        if not total > 0:
            raise ValueError("nothing to stack: the weights sum to 0")
        return {
            group: factors.stack(
                _covering([factors.bake(p[group], w / total) for p, w in self._parts])
            )
            for group in self._parts[0][0]
        }


class MeanAndResidual:
    """The weighted means of the group "adapter", and what their product lacks, as factors.

    With p_m = w_m / Σ w and the means Ā, B̄ of M clients of one rank r,

        Σ p_m B_m A_m - B̄ Ā = Σ_{m<M} (B_m - B_M) · p_m (A_m - Ā),

    a product of rank (M - 1) r, here without any decomposition. Differences from a common start
    give the same residual. Keeps every client's factors.
    """

    linear = False

    def __init__(self) -> None:
        self._mean = WeightedMean()
        self._parts: list[tuple[Params, float]] = []

    def add(self, payload: Payload, weight: float) -> None:
        self._mean.add(payload, weight)
        own = factors.select(payload["adapter"], factors.is_a, factors.is_b)
        self._parts.append((own, weight))

    def merge(self, other: Self) -> None:
        self._mean.merge(other._mean)
        self._parts.extend(other._parts)

    def finalise(self) -> Payload:
        aggregate = self._mean.finalise()
        total = sum(weight for _, weight in self._parts)
        last, _ = self._parts[-1]
        means = aggregate["adapter"]
        blocks = [_residual(part, last, means, w / total) for part, w in self._parts[:-1]]
        blocks = blocks or [{n: t[:0] if factors.is_a(n) else t[:, :0] for n, t in last.items()}]
        return {**aggregate, "residual": factors.stack(blocks)}


def _covering(parts: Sequence[Params]) -> Sequence[Params]:
    """The parts with factors of rank 0 for modules that only others have."""
    empty = {n: t[:0] if factors.is_a(n) else t[:, :0] for own in parts for n, t in own.items()}
    return [{**empty, **own} for own in parts]


def _residual(part: Params, last: Params, means: Params, share: float) -> Params:
    """(B_m - B_M) and p_m (A_m - Ā)."""
    block = {n: t.double() - (means if factors.is_a(n) else last)[n] for n, t in part.items()}
    return {n: t.to(part[n].dtype) for n, t in factors.bake(block, share).items()}
