"""FedProx: local training that stays near the global model.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127.
"""

from dataclasses import dataclass
from typing import ClassVar

from corolla.interfaces import Client
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import tree
from corolla.types import Params, Payload, Update


@listed
@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with the local loss + (mu / 2) |w - w_t|², over the factors A and B and the head.

    On LoRA this ties the factors, not their product: it is not the same for (B R, R⁻¹ A). With
    mu = 0 it is FedAvg.
    """

    name: ClassVar[str] = "fedprox"
    when: ClassVar[str] = "FedAvg whose clients drift apart: long local training, unlike data"

    mu: float = option(0.01, "The weight of the proximal term, (mu / 2) |w - w_t|².", 0.1)

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"mu must be at least 0, found {self.mu}")

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]

        def pull(gradients: Params, weights: Params) -> Params:
            return {n: g + self.mu * (weights[n] - start[n].to(g)) for n, g in gradients.items()}

        fit = client.trainer.fit(start, correct=pull if self.mu else None)
        return Update({"adapter": tree.sub(fit.params, start)}, fit.num_examples, fit.metrics)
