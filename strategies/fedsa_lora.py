"""FedSA-LoRA: A is shared, B stays on the device.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv 2410.01463.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Client, Observed
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
class FedSaLora:
    """Clients train A and B; A is averaged, B and the head are each client's own.

    There is no global model to speak of: A with B = 0 is the base model, and what counts is each
    client's loss on its own examples. A newcomer starts from B = 0 and the base model's head. The
    personal adapters are saved on the devices (in a simulation: clients/<client>/adapter/).
    """

    name: ClassVar[str] = "fedsa_lora"
    aggregates: ClassVar[Aggregates] = "other"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    personal: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    when: ClassVar[str] = "a model for each client, at half the bytes; no global model"

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": factors.select(start, factors.is_a)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        shared = received["adapter"]
        own = client.kept.get("personal", {})
        fit = client.trainer.fit({**client.trainer.init(client.seed), **shared, **own})
        moved = {name: fit.params[name] - tensor for name, tensor in shared.items()}
        keep = {"personal": factors.select(fit.params, factors.is_b, factors.is_head)}
        return Update({"adapter": moved}, fit.num_examples, fit.metrics, keep)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": factors.select(fresh, factors.is_a)}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {"adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter({**state["adapter"], **state.get("personal", {})})

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * s.A, down=4 * s.A) for s in cohort]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The mean of A over what the clients trained."""
        return factors.mean(rounds[-1].trained, rounds[-1].weights, factors.is_a)
