"""FedAdagrad, FedAdam, FedYogi: adaptive optimisers on the server.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla.interfaces import Observed
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import Aggregates, Broadcast, Metrics, Params, Payload


@listed
@dataclass(frozen=True)
class FedAdam(FedAvg):
    """m ← β₁ m + (1 - β₁) Δ, v ← β₂ v + (1 - β₂) Δ², w ← w + lr m / (√v + tau).

    Δ = Σ p_m (w_m - w) over the factors A and B and the head; v starts at tau², there is no
    correction for bias, as in the paper. The size of a step hardly depends on that of Δ: lr asks
    for a search of its own. tau is the least √v that counts.
    """

    name: ClassVar[str] = "fedadam"
    aggregates: ClassVar[Aggregates] = "other"
    when: ClassVar[str] = "FedAvg whose tensors differ in scale, and a server rate to search"

    lr: float = option(1e-2, "The learning rate of the server.", 1e-3)
    beta1: float = option(0.9, "The decay of the mean of updates (momentum).", 0.5)
    beta2: float = option(0.99, "The decay of the mean of their squares.", 0.999)
    tau: float = option(1e-3, "The least root of that mean that counts.", 1e-2)

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"beta1 and beta2 must be from 0 to below 1, found {self.beta1} and {self.beta2}"
            )
        if not (self.lr > 0 and self.tau > 0):
            raise ValueError(f"lr and tau must be above 0, found {self.lr} and {self.tau}")

    def init(self, start: Params, seed: int) -> Payload:
        floor = {name: torch.full_like(tensor, self.tau**2) for name, tensor in start.items()}
        return {"adapter": start, "momentum": tree.scale(start, 0.0), "variance": floor}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"adapter": state["adapter"]})

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after: dict[str, dict[str, Tensor]] = {"adapter": {}, "momentum": {}, "variance": {}}
        for name, delta in aggregate["adapter"].items():
            m = self.beta1 * state["momentum"][name] + (1 - self.beta1) * delta
            v = self._variance(state["variance"][name], delta)
            step = self.lr * m / (v.sqrt() + self.tau)
            after["adapter"][name] = state["adapter"][name] + step
            after["momentum"][name], after["variance"][name] = m, v
        return after, {}

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The sums written out: m_t = (1 - β₁) Σ_s β₁^(t-s) Δ_s, and v_t in the same way."""
        deltas = [tree.sub(factors.mean(own.trained, own.weights), own.start) for own in rounds]
        found: dict[str, Tensor] = {}
        for name, start in rounds[0].start.items():
            path = [delta[name] for delta in deltas]
            found[name] = start.double()
            for t in range(len(path)):
                m = sum(
                    (1 - self.beta1) * self.beta1 ** (t - s) * d
                    for s, d in enumerate(path[: t + 1])
                )
                root = torch.as_tensor(self._variance_after(path[: t + 1])).sqrt()
                found[name] = found[name] + self.lr * m / (root + self.tau)
        return found

    def _variance(self, v: Tensor, delta: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * delta.square()

    def _variance_after(self, path: Sequence[Tensor]) -> Tensor:
        t = len(path)
        terms = [self.beta2 ** (t - 1 - s) * d.square() for s, d in enumerate(path)]
        return self.beta2**t * self.tau**2 + (1 - self.beta2) * torch.stack(terms).sum(0)


@listed
@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAdam with v ← v - (1 - β₂) Δ² sign(v - Δ²): v forgets large steps slowly."""

    name: ClassVar[str] = "fedyogi"
    when: ClassVar[str] = "FedAdam on rounds of very different size"

    def _variance(self, v: Tensor, delta: Tensor) -> Tensor:
        return v - (1 - self.beta2) * delta.square() * (v - delta.square()).sign()

    def _variance_after(self, path: Sequence[Tensor]) -> Tensor:
        v = torch.full_like(path[0], self.tau**2)
        for delta in path:
            square = delta.square()
            up = torch.where(square > v, (1 - self.beta2) * square, 0.0)
            v = v + up - torch.where(square < v, (1 - self.beta2) * square, 0.0)
        return v


@listed
@dataclass(frozen=True)
class FedAdagrad(FedAdam):
    """FedAdam with v ← v + Δ², and no momentum by default: steps shrink for good."""

    name: ClassVar[str] = "fedadagrad"
    when: ClassVar[str] = "FedAvg on sparse features, over few rounds"

    beta1: float = option(0.0, "The decay of the mean of updates (momentum).", 0.5)
    beta2: float = option(0.99, "No part of FedAdagrad, which adds up squares: 0.99 alone.", 0.99)

    def __post_init__(self) -> None:
        if self.beta2 != FedAdam.beta2:
            raise ValueError("beta2 is not part of FedAdagrad: v adds up all squares")
        super().__post_init__()

    def _variance(self, v: Tensor, delta: Tensor) -> Tensor:
        return v + delta.square()

    def _variance_after(self, path: Sequence[Tensor]) -> Tensor:
        return self.tau**2 + torch.stack(list(path)).square().sum(0)
