"""FedMeZO: zeroth-order local training of LoRA, averaged as in FedAvg.

Ling et al., "On the Convergence of Zeroth-Order Federated Tuning for Large Language Models", KDD
2024, arXiv 2402.05926.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla import tree
from corolla.aggregation import WeightedMean
from corolla.directions import GaussianPool
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Client,
    Cost,
    Metrics,
    Params,
    Payload,
    Size,
    TrainerName,
    Update,
)


@dataclass(frozen=True)
class FedMeZO:
    """FedAvg whose clients take MeZO's steps: a new Gaussian direction for every query.

    Saves the memory of backpropagation and no bytes: whole adapters travel. Averages A and B apart,
    as FedAvg does.
    """

    name: ClassVar[str] = "fedmezo"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("zeroth_order",)
    full: ClassVar[bool] = False

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": start}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        pool = GaussianPool(client.seed)
        walk = client.forward.walk(start, (), pool, range(client.forward.queries))
        return Update({"adapter": tree.sub(walk.params, start)}, walk.num_examples, walk.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": fresh}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {"adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["adapter"])

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * n, down=4 * n) for n in (s.A + s.B + s.head for s in cohort)]
