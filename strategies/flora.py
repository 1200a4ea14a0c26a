"""FLoRA: stacking aggregation.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla.aggregation.stacks import Stack
from corolla.aggregation.sums import ByGroup, WeightedMean
from corolla.interfaces import Client, Observed
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import blocks, dense, factors, tree
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
class Flora:
    """Stacks the clients' factors, so that the product is Σ p_m s_m B_m A_m exactly.

    Each round every client trains a fresh adapter of its own rank (A random, B zero). The stack
    of a round, of rank Σ r_m, becomes a frozen block beside the base model: it is never merged
    into it. Once the blocks' rank is more than `compact_at` times the full rank of the modules, all
    are replaced by one block of that rank, which loses nothing.

    Blocks are sent once: a client that was absent receives all that it has missed. With `energy`
    below 1 the stack of a round is first truncated to the smallest rank that keeps this part of
    its squared singular values, as in FLoRIST (2025): fewer bytes down, and no longer exact.

    Every client receives every other client's factors, and re-initialisation costs progress when
    local training is short (arXiv 2410.09432, table 4).
    """

    name: ClassVar[str] = "flora"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = True
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False

    updates: ClassVar[str] = "factors"
    individual: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    stale: ClassVar[bool] = True
    partial: ClassVar[str] = "absent"
    when: ClassVar[str] = "exact with clients of different ranks, over few and long rounds"

    compact_at: float = option(
        2.0,
        "How many times the modules' full rank all blocks may have before they are compacted.",
        4.0,
    )
    energy: float = option(
        1.0,
        "The part of a stack's squared singular values that truncation keeps; 1 keeps all.",
        0.99,
    )

    def __post_init__(self) -> None:
        blocks.check(self.compact_at)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, found {self.energy}")

    def init(self, start: Params, seed: int) -> Payload:
        return {"head": factors.select(start, factors.is_head)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"head": state["head"]}, cached=blocks.of(state))

    def local(self, client: Client, received: Payload) -> Update:
        head = received["head"]
        start = {**client.trainer.init(client.seed), **head}
        fit = client.trainer.fit(start, frozen=list(blocks.of(received).values()))
        trained = factors.select(fit.params, factors.is_a, factors.is_b)
        payload = {
            "factors": factors.bake(trained, client.lora.scaling),
            "head": tree.sub({name: fit.params[name] for name in head}, head),
        }
        return Update(payload, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {
            "factors": factors.select(fresh, factors.is_a, factors.is_b),
            "head": factors.select(fresh, factors.is_head),
        }

    def aggregator(self) -> ByGroup:
        return ByGroup({"factors": Stack(), "head": WeightedMean()})

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        block, lost = aggregate["factors"], {}
        if self.energy < 1:
            block, error = factors.compact(block, energy=self.energy)
            lost = {"truncation_error": error}
        kept, metrics = blocks.append(state, block, self.compact_at)
        head = tree.add(state["head"], aggregate["head"])
        return {"head": head, **kept}, {**metrics, **lost}

    def cut(self, state: Payload, rank: int) -> tuple[Payload, Metrics]:
        _, kept, metrics = blocks.cut(state, rank)
        return {"head": state["head"], **kept}, metrics

    def rank_after(self, rounds: int, cohort: Sequence[Size]) -> int:
        return rounds * sum(size.rank for size in cohort)

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["head"], tuple(blocks.of(state).values()))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        stack = sum(s.trained.A + s.trained.B for s in cohort)
        cut = self.energy < 1
        return [Cost(4 * s.trained.values, 4 * (stack + s.head), at_most=cut) for s in cohort]

    @property
    def exact(self) -> bool:
        """True where the options cut nothing."""
        return self.energy == 1

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The sum of all rounds' dense means, each cut to `energy`."""
        last, total = rounds[-1], dict[str, Tensor]()
        for own in rounds:
            for m in factors.modules(last.start):
                scaled = [
                    p * own.lora[c].scaling * factors.product(own.trained[c], m)
                    for c, p in own.weights.items()
                ]
                block = torch.stack(scaled).sum(0)
                if self.energy < 1:
                    block, _ = dense.cut(block, energy=self.energy)
                total[m] = total.get(m, 0) + block
        found = factors.mean(last.trained, last.weights, factors.is_head)
        for m, added in total.items():
            found[m + factors.B] = added / last.spec.scaling
            found[m + factors.A] = torch.eye(added.shape[1], dtype=added.dtype)
        return found

    def cost_from(self, state: Payload, cohort: Sequence[Size]) -> Sequence[Cost]:
        """After a compaction, what it made of all blocks stands for the last round's stack."""
        block = blocks.compacted(state)
        if block is None:
            return self.cost(cohort)
        made = tree.count(block)
        return [Cost(4 * s.trained.values, 4 * (made + s.head)) for s in cohort]
