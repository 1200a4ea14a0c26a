"""An aggregator of factors of different ranks: each is filled up with zeros."""

from typing import Self

import torch
from torch import Tensor

from corolla.tensors import factors
from corolla.types import Params, Payload


class NormWeighted:
    """Padded factors weighted by |B_m A_m|_F in each module; equal weights where all are zero."""

    linear = False

    def __init__(self, normalise: bool) -> None:
        self._normalise = normalise
        self._parts: list[Params] = []

    def add(self, payload: Payload, weight: float) -> None:
        self._parts.append(payload["factors"])

    def merge(self, other: Self) -> None:
        self._parts.extend(other._parts)

    def finalise(self) -> Payload:
        if not self._parts:
            raise ValueError("nothing to average: no client")
        rank = max(factors.rank(part) for part in self._parts)
        padded = [factors.pad(part, rank) for part in self._parts]
        out: dict[str, Tensor] = {}
        for module in factors.modules(padded[0]):
            norms = torch.tensor([_gram_norm(part, module) for part in self._parts]).double()
            norms = norms if float(norms.sum()) > 0 else torch.ones_like(norms)
            has = torch.stack([_rows(part, module) for part in padded])
            total = (norms[:, None] * has).sum(0) if self._normalise else norms.sum().expand(rank)
            total = total.clamp(min=1e-300)  # a row that nobody has is zeros
            for role, shape in ((factors.A, (-1, 1)), (factors.B, (1, -1))):
                values = zip(norms, (part[module + role].double() for part in padded), strict=True)
                mean = torch.stack([n * value for n, value in values]).sum(0)
                out[module + role] = (mean / total.reshape(shape)).float()
        return {"factors": out}


def _rows(params: Params, module: str) -> Tensor:
    """Marks, as (r,), the rows of A and columns of B that are neither padded nor pruned."""
    return params[module + factors.A].any(1) | params[module + factors.B].any(0)


def _gram_norm(params: Params, module: str) -> float:
    """|B A|_F = √tr(Bᵀ B A Aᵀ), without the product, in fp64."""
    a, b = params[module + factors.A].double(), params[module + factors.B].double()
    return float((b.T @ b * (a @ a.T).T).sum().clamp(min=0).sqrt())
