"""FedAvg over LoRA factors (FedIT).

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629; on LoRA: Zhang et al., "Towards Building the Federated GPT:
Federated Instruction Tuning", ICASSP 2024, arXiv 2305.05644.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Aggregator, Client
from corolla.strategies.listing.mark import listed
from corolla.tensors import tree
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Cost,
    Metrics,
    Params,
    Payload,
    Size,
    TrainerName,
    Update,
)


@listed
@dataclass(frozen=True)
class FedAvg:
    """Averages A and B separately: w ← w + Σ p_m (w_m - w), p_m = n_m / Σ n, where
    n_m counts the distinct examples that a client trained on in the round.

    Not exact on the effective weights: with the means Ā and B̄,
    Σ p_m B_m A_m - B̄ Ā = Σ p_m (B_m - B̄)(A_m - Ā), the weighted covariance of the factors,
    which vanishes when all clients agree on A or on B. Exact for a classifier head.
    """

    name: ClassVar[str] = "fedavg"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    stale: ClassVar[bool] = True
    partial: ClassVar[str] = "absent"
    when: ClassVar[str] = "the baseline; exact only where clients agree on A or on B"

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": start}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        fit = client.trainer.fit(start)
        return Update({"adapter": tree.sub(fit.params, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": fresh}

    def aggregator(self) -> Aggregator:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {"adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["adapter"])

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * s.trained.values, down=4 * s.values) for s in cohort]
