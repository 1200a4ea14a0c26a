"""RoLoRA: alternating optimisation of the factors.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS
2025, arXiv 2502.01755 (before: arXiv 2409.02346).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Client
from corolla.strategies.listing.mark import listed
from corolla.tensors import factors
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
class RoLora:
    """Odd rounds train and average B with A frozen, even rounds A with B frozen; the head always.

    Exact, because the frozen factor is the same everywhere: Σ p_m s B_m A = s (Σ p_m B_m) A, and
    so for A. B comes first: with B = 0 the gradient of A is zero. The phase travels with the
    broadcast. Each factor is sent when it has changed, to those who had the one before; a client
    that was absent receives both.
    """

    name: ClassVar[str] = "rolora"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    when: ClassVar[str] = "many clients and short local training, at half the bytes; suits DP"

    def init(self, start: Params, seed: int) -> Payload:
        return {
            "A": factors.select(start, factors.is_a),
            "B": factors.select(start, factors.is_b),
            "head": factors.select(start, factors.is_head),
            "phase": {"trains_a": torch.tensor(0, dtype=torch.uint8)},
        }

    def broadcast(self, state: Payload) -> Broadcast:
        control = {"head": state["head"], "phase": state["phase"]}
        return Broadcast(control, cached={"A": state["A"], "B": state["B"]})

    def local(self, client: Client, received: Payload) -> Update:
        start = {**received["A"], **received["B"], **received["head"]}
        frozen = factors.is_b if received["phase"]["trains_a"] else factors.is_a
        fit = client.trainer.fit(start, train=lambda name: not frozen(name))
        moved = {n: fit.params[n] - tensor for n, tensor in start.items() if not frozen(n)}
        return Update({"adapter": moved}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        trained = factors.is_a if _trains_a(size) else factors.is_b
        return {"adapter": factors.select(fresh, trained, factors.is_head)}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        moved = aggregate["adapter"]
        after = {
            group: {n: t + moved[n] if n in moved else t for n, t in state[group].items()}
            for group in ("A", "B", "head")
        }
        phase = 1 - state["phase"]["trains_a"]
        return {**after, "phase": {"trains_a": phase}}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter({**state["A"], **state["B"], **state["head"]})

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        costs = []
        for s in cohort:
            trained, other = (s.A, s.B) if _trains_a(s) else (s.B, s.A)
            costs.append(Cost(4 * (trained + s.head), 4 * (other + s.head) + 1, once=4 * trained))
        return costs


def _trains_a(size: Size) -> bool:
    return size.round % 2 == 0
