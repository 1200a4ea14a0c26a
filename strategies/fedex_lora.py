"""FedEx-LoRA: exact aggregation that keeps the trained adapters.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", ACL 2025, arXiv 2410.09432.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla.aggregation.stacks import MeanAndResidual
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
class FedExLora:
    """Averages A and B as FedAvg does, and freezes what their product lacks beside the base model.

    W ← W + s (Σ p_m B_m A_m - B̄ Ā), A ← Ā, B ← B̄. The residual is a product of rank (M - 1) r,
    found without a decomposition (see MeanAndResidual), so that a round costs the same bytes as
    FLoRA, but clients go on from trained adapters. With `residual_rank` only its best
    approximation of that rank travels (Eckart and Young): fewer bytes down, and no longer exact.

    Blocks are sent once and compacted as FLoRA's are: see corolla.tensors.blocks. Every client
    receives what single clients' factors can be recovered from.
    """

    name: ClassVar[str] = "fedex_lora"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    individual: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    when: ClassVar[str] = "exact whatever the number of local steps, where ranks may grow"

    residual_rank: int | None = option(
        None,
        "The rank that a round's residual is cut to; null: nothing is cut, the aggregate is exact.",
        8,
    )
    compact_at: float = option(
        2.0,
        "How many times the modules' full rank all blocks may have before they are compacted.",
        4.0,
    )

    def __post_init__(self) -> None:
        blocks.check(self.compact_at)
        own = self.residual_rank
        if own is not None and (type(own) is not int or own < 1):
            raise ValueError(f"residual_rank must be a whole number from 1, found {own}")

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": start}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"adapter": state["adapter"]}, cached=blocks.of(state))

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        scaling = client.lora.scaling
        frozen = [factors.bake(block, scaling) for block in blocks.of(received).values()]
        fit = client.trainer.fit(start, frozen=frozen)
        return Update({"adapter": tree.sub(fit.params, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": fresh}

    def aggregator(self) -> MeanAndResidual:
        return MeanAndResidual()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        residual, lost = aggregate["residual"], {}
        if self.residual_rank is not None:
            residual, error = factors.compact(residual, self.residual_rank)
            lost = {"truncation_error": error}
        kept, metrics = blocks.append(state, residual, self.compact_at)
        adapter = tree.add(state["adapter"], aggregate["adapter"])
        return {"adapter": adapter, **kept}, {**metrics, **lost}

    def cut(self, state: Payload, rank: int) -> tuple[Payload, Metrics]:
        """Clients go on with the directions of the largest singular values, the rest is frozen."""
        own = factors.select(state["adapter"], factors.is_a, factors.is_b)
        trained, kept, metrics = blocks.cut(state, rank, own)
        return {"adapter": {**state["adapter"], **trained}, **kept}, metrics

    def rank_after(self, rounds: int, cohort: Sequence[Size]) -> int:
        return sum(s.rank for s in cohort[:1]) + rounds * sum(s.rank for s in cohort[1:])

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["adapter"], residuals=tuple(blocks.of(state).values()))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        costs = []
        for s in cohort:
            rank = (len(cohort) - 1) * s.rank  # of the residual
            rank = min(rank, self.residual_rank or rank)
            residual = rank * (s.A + s.B) // s.rank
            whole = s.A + s.B + s.head
            costs.append(Cost(up=4 * whole, down=4 * (whole + residual)))
        return costs

    @property
    def exact(self) -> bool:
        """True where the options cut nothing."""
        return self.residual_rank is None

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The means of A and B beside the sum of all rounds' dense residuals, cut as asked."""
        last, total = rounds[-1], dict[str, Tensor]()
        for own in rounds:
            means = factors.mean(own.trained, own.weights)
            for m in factors.modules(last.start):
                products = [p * factors.product(own.trained[c], m) for c, p in own.weights.items()]
                block = torch.stack(products).sum(0) - factors.product(means, m)
                if self.residual_rank is not None:
                    most = min(self.residual_rank, (len(products) - 1) * own.spec.rank)
                    block = dense.cut(block, most)[0] if most else block
                total[m] = total.get(m, 0) + block
        found = factors.mean(last.trained, last.weights)
        for m, added in total.items():
            eye = torch.eye(added.shape[1], dtype=added.dtype)
            found[m + factors.B] = torch.cat([found[m + factors.B], added], dim=1)
            found[m + factors.A] = torch.cat([found[m + factors.A], eye], dim=0)
        return found

    def cost_from(self, state: Payload, cohort: Sequence[Size]) -> Sequence[Cost]:
        """After a compaction, what it made of all blocks stands for the last round's residual."""
        block = blocks.compacted(state)
        if block is None:
            return self.cost(cohort)
        wholes = [s.A + s.B + s.head for s in cohort]
        return [Cost(4 * whole, 4 * (whole + tree.count(block))) for whole in wholes]
