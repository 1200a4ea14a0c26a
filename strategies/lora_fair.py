"""LoRA-FAIR: averaged factors, B corrected towards the exact update.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, arXiv 2411.14961.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from corolla.aggregation.stacks import MeanAndResidual
from corolla.interfaces import Observed
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import Aggregates, Metrics, Params, Payload


@listed
@dataclass(frozen=True)
class LoraFair(FedAvg):
    """A ← Ā, B ← B̄ + ΔB, where ΔB brings B A as near to Σ p_m B_m A_m as Ā allows.

    The paper finds ΔB by gradient steps on a similarity plus a penalty on |ΔB|; here is the closed
    form of the squared one: min |R - ΔB Ā|² + λ |ΔB|², R = Σ p_m B_m A_m - B̄ Ā, which is
    ΔB = R Āᵀ (Ā Āᵀ + λ I)⁻¹. `penalty` is λ relative to the mean of the diagonal of Ā Āᵀ; without
    it B is the best one for Ā, with much of it this is FedAvg.
    """

    name: ClassVar[str] = "lora_fair"
    aggregates: ClassVar[Aggregates] = "other"
    individual: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    stale: ClassVar[bool] = False
    partial: ClassVar[str] = ""
    when: ClassVar[str] = "nearer to exact than FedAvg at the same bytes, one rank for all"

    penalty: float = option(
        0.01, "The weight of the penalty on the correction of B; much of it is FedAvg.", 0.1
    )

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise ValueError(f"penalty must be at least 0, found {self.penalty}")

    def aggregator(self) -> MeanAndResidual:
        return MeanAndResidual()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        adapter = dict(tree.add(state["adapter"], aggregate["adapter"]))
        residual = aggregate["residual"]
        for module in factors.modules(residual):
            a = adapter[module + factors.A].double()
            gram = a @ a.T
            gram += self.penalty * gram.diagonal().mean() * torch.eye(len(gram))
            left, right = (residual[module + role].double() for role in (factors.B, factors.A))
            # A pseudo-inverse: without a penalty Ā may lack rank.
            step = left @ (right @ a.T) @ torch.linalg.pinv(gram, hermitian=True)
            adapter[module + factors.B] = (adapter[module + factors.B] + step).to(torch.float32)
        return {"adapter": adapter}, {}

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Least squares on dense matrices: [Āᵀ; √λ I] ΔBᵀ = [Rᵀ; 0]."""
        last = rounds[-1]
        found = factors.mean(last.trained, last.weights)
        for m in factors.modules(found):
            a, b = found[m + factors.A], found[m + factors.B]
            exact = sum(p * factors.product(last.trained[c], m) for c, p in last.weights.items())
            ridge = (self.penalty * (a @ a.T).diagonal().mean()).sqrt() * torch.eye(len(a))
            left = torch.cat([a.T, ridge.double()])
            right = torch.cat([(exact - b @ a).T, torch.zeros(len(a), len(b), dtype=a.dtype)])
            found[m + factors.B] = b + torch.linalg.lstsq(left, right, driver="gelsd").solution.T
        return found
