"""FedAvgM: server momentum.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, arXiv 1909.06335.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from corolla.interfaces import Observed
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import Aggregates, Broadcast, Metrics, Params, Payload


@listed
@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """v ← beta v + Σ p_m (w_m - w), w ← w + lr v, over the factors A and B and the head.

    With beta = 0 and lr = 1 it is FedAvg.
    """

    name: ClassVar[str] = "fedavgm"
    aggregates: ClassVar[Aggregates] = "other"
    when: ClassVar[str] = "FedAvg with small cohorts, whose rounds pull in different directions"

    beta: float = option(0.9, "The momentum of the server.", 0.5)
    lr: float = option(1.0, "The learning rate of the server.", 0.5)

    def __post_init__(self) -> None:
        if not (0 <= self.beta < 1 and self.lr > 0):
            raise ValueError(f"needs 0 <= beta < 1 and lr > 0, found {self.beta} and {self.lr}")

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": start, "momentum": tree.scale(start, 0.0)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"adapter": state["adapter"]})

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        momentum = tree.add(tree.scale(state["momentum"], self.beta), aggregate["adapter"])
        adapter = tree.add(state["adapter"], tree.scale(momentum, self.lr))
        return {"adapter": adapter, "momentum": momentum}, {}

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Torch's SGD with momentum, on the pseudo-gradients of all rounds."""
        weights = {n: t.double().clone() for n, t in rounds[0].start.items()}
        optimizer = torch.optim.SGD(weights.values(), lr=self.lr, momentum=self.beta)
        for own in rounds:
            means = factors.mean(own.trained, own.weights)
            for name, weight in weights.items():
                weight.grad = own.start[name].double() - means[name]
            optimizer.step()
        return weights
