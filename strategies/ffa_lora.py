"""FFA-LoRA: federated freeze-A LoRA.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
arXiv 2403.12313.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Aggregator, Client
from corolla.strategies.listing.mark import listed
from corolla.tensors import factors, tree
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
class FfaLora:
    """Trains and averages B (and the head); A stays at its random start, the same everywhere.

    Exact: Σ p_m s B_m A = s (Σ p_m B_m) A. A travels once to each client. The fixed A limits
    what can be learnt; a larger learning rate than FedAvg's is usual.
    """

    name: ClassVar[str] = "ffa_lora"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    stale: ClassVar[bool] = True
    partial: ClassVar[str] = "absent"
    when: ClassVar[str] = "exact at about half the bytes, if a random A is enough; suits DP"

    def init(self, start: Params, seed: int) -> Payload:
        a = factors.select(start, factors.is_a)
        return {"A": a, "adapter": factors.select(start, factors.is_b, factors.is_head)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"adapter": state["adapter"]}, cached={"A": state["A"]})

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        fit = client.trainer.fit({**received["A"], **start}, train=lambda n: not factors.is_a(n))
        trained = {name: fit.params[name] for name in start}
        return Update({"adapter": tree.sub(trained, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": factors.select(fresh, factors.is_b, factors.is_head)}

    def aggregator(self) -> Aggregator:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {**state, "adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter({**state["A"], **state["adapter"]})

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(4 * (s.trained.B + s.head), 4 * (s.B + s.head), 4 * s.A) for s in cohort]
