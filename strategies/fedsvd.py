"""FedSVD: freeze-A LoRA whose A follows the data.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS
2025, arXiv 2505.12805.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Client
from corolla.strategies.listing import listed
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
class FedSvd:
    """Clients train B only; after each round B A = U S Vᵀ, then A ← Vᵀ, B ← U S (at scaling 1).

    Exact: the mean is taken with A the same everywhere, and the decomposition changes no product.
    The rows of A stay orthonormal and turn to where the update is, which FFA-LoRA's random A
    cannot. A linear aggregate with a fixed step after it: noise on the sum of B is enough for
    differential privacy.
    """

    name: ClassVar[str] = "fedsvd"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    rebases: ClassVar[bool] = True
    when: ClassVar[str] = "differential privacy: noise on B alone, and an A that adapts"

    def init(self, start: Params, seed: int) -> Payload:
        a = factors.select(start, factors.is_a)
        return {"A": a, "adapter": factors.select(start, factors.is_b, factors.is_head)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        fit = client.trainer.fit({**received["A"], **start}, train=lambda n: not factors.is_a(n))
        trained = {name: fit.params[name] for name in start}
        return Update({"adapter": tree.sub(trained, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": factors.select(fresh, factors.is_b, factors.is_head)}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        adapter = dict(tree.add(state["adapter"], aggregate["adapter"]))
        a = dict(state["A"])
        for module, u, s, vt in factors.svd({**a, **adapter}):
            a[module + factors.A] = vt.float()
            adapter[module + factors.B] = (u * s).float()
        return {"A": a, "adapter": adapter}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter({**state["A"], **state["adapter"]})

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * (s.B + s.head), down=4 * (s.A + s.B + s.head)) for s in cohort]
