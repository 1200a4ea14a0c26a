"""FlexLoRA: the mean of the products, decomposed and cut to each client's rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505.
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
from corolla.tensors import factors, tree
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Cost,
    LoraSpec,
    Metrics,
    Params,
    Payload,
    Size,
    TrainerName,
    Update,
)


@listed
@dataclass(frozen=True)
class FlexLora:
    """Σ p_m s_m B_m A_m = U S Vᵀ; a client of rank r goes on from its best approximation of rank r.

    The decomposition is that of the stacked factors (QR, then the SVD of a small matrix): no
    (out, in) matrix is formed. A client starts from B = U_r S_r / s, A = V_rᵀ, or with `balanced`
    from B = U_r √S_r / √s, A = √S_r V_rᵀ / √s: the first makes A orthonormal, and asks for
    another learning rate. The global adapter has the largest rank of the clients: exact as long as
    the mean has no larger one, else the best approximation.
    """

    name: ClassVar[str] = "flexlora"
    aggregates: ClassVar[Aggregates] = "other"
    mixed_ranks: ClassVar[bool] = True
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    updates: ClassVar[str] = "factors"
    individual: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    partial: ClassVar[str] = "sent"
    when: ClassVar[str] = "clients of different ranks, at the bytes of their own rank"

    balanced: bool = option(
        False, "Whether the singular values are shared by A and B instead of all being in B.", True
    )

    def init(self, start: Params, seed: int) -> Payload:
        return {
            "global": factors.select(start, factors.is_a, factors.is_b),
            "head": factors.select(start, factors.is_head),
        }

    def broadcast(self, state: Payload) -> Broadcast:
        """`global` holds U S and Vᵀ, the largest singular values first."""

        def fitted(lora: LoraSpec) -> Payload:
            return {"adapter": self._split(state["global"], lora)}

        return Broadcast({"head": state["head"]}, fitted=fitted)

    def local(self, client: Client, received: Payload) -> Update:
        head = received["head"]
        fit = client.trainer.fit({**received["adapter"], **head})
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
        after = dict(state["global"])
        lost = total = 0.0
        for module, u, s, vt in factors.svd(aggregate["factors"], factors.rank(after)):
            a, b = after[module + factors.A].clone(), torch.zeros_like(after[module + factors.B])
            keep = min(len(a), len(s))  # directions beyond what the clients have stay as they were
            b[:, :keep], a[:keep] = u[:, :keep] * s[:keep], vt[:keep]
            after[module + factors.A], after[module + factors.B] = a, b
            lost, total = lost + float(s[keep:].square().sum()), total + float(s.square().sum())
        error = (lost / total) ** 0.5 if total else 0.0
        head = tree.add(state["head"], aggregate["head"])
        return {"global": after, "head": head}, {"truncation_error": error}

    def adapter(self, state: Payload) -> Adapter:
        if "adapter" in state:  # what a client has received
            return Adapter({**state["adapter"], **state["head"]})
        return Adapter(state["head"], frozen=(state["global"],))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * s.values, down=4 * s.values) for s in cohort]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The SVD of the dense mean."""
        last = rounds[-1]
        found = factors.mean(last.trained, last.weights, factors.is_head)
        for m in factors.modules(last.start):
            dense = sum(
                p * last.lora[c].scaling * factors.product(last.trained[c], m)
                for c, p in last.weights.items()
            )
            u, s, vt = torch.linalg.svd(dense, full_matrices=False)
            keep = last.spec.rank
            found[m + factors.B] = u[:, :keep] * s[:keep] / last.spec.scaling
            found[m + factors.A] = vt[:keep]
        return found

    def _split(self, whole: Params, lora: LoraSpec) -> Params:
        """The start of a client of this rank and scaling."""
        start: dict[str, Tensor] = {}
        for module in factors.modules(whole):
            b = whole[module + factors.B][:, : lora.rank]
            a = whole[module + factors.A][: lora.rank]
            values = b.norm(dim=0)
            if self.balanced:
                root = torch.where(values > 0, values, 1.0).sqrt() / lora.scaling**0.5
                b, a = b / (root * lora.scaling), a * root[:, None]
            else:
                b = b / lora.scaling
            start[module + factors.A], start[module + factors.B] = a, b
        return start
