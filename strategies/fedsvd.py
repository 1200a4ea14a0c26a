"""FedSVD: freeze-A LoRA whose A follows the data.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS
2025, arXiv 2505.12805.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import Broadcast, Cost, Metrics, Payload, Size


@listed
@dataclass(frozen=True)
class FedSvd(FfaLora):
    """Clients train B only; after each round B A = U S Vᵀ, then A ← Vᵀ, B ← U S (at scaling 1).

    Exact: the mean is taken with A the same everywhere, and the decomposition changes no product.
    The rows of A stay orthonormal and turn to where the update is, which FFA-LoRA's random A
    cannot. A linear aggregate with a fixed step after it: noise on the sum of B is enough for
    differential privacy.
    """

    name: ClassVar[str] = "fedsvd"
    rebases: ClassVar[bool] = True
    stale: ClassVar[bool] = False
    when: ClassVar[str] = "differential privacy: noise on B alone, and an A that adapts"

    train: Literal["B"] = option("B", "No choice of FedSVD, whose A is given: B alone.", "B")

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        adapter = dict(tree.add(state["adapter"], aggregate["adapter"]))
        a = dict(state["A"])
        for module, u, s, vt in factors.svd({**a, **adapter}):
            a[module + factors.A] = vt.float()
            adapter[module + factors.B] = (u * s).float()
        return {"A": a, "adapter": adapter}, {}

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * (s.B + s.head), down=4 * (s.A + s.B + s.head)) for s in cohort]
