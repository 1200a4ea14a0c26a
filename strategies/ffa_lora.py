"""FFA-LoRA: federated freeze-A LoRA.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
arXiv 2403.12313.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from corolla import seeds
from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Aggregator, Client
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
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

    With `train` "A" the factors swap: B stays and A moves, as MiCA and rows of S2FT want it
    (`start`). Where the start has B = 0, B becomes random and A zero.
    """

    name: ClassVar[str] = "ffa_lora"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    stale: ClassVar[bool] = True
    partial: ClassVar[str] = "absent"
    when: ClassVar[str] = "exact at about half the bytes, if a random A is enough; suits DP"

    train: Literal["A", "B"] = option("B", "The factor that is trained; the other one stays.", "A")

    def __post_init__(self) -> None:
        if self.train not in ("A", "B"):
            raise ValueError(f"train must be A or B, found {self.train!r}")

    def init(self, start: Params, seed: int) -> Payload:
        if self.train == "A":
            start = {**start, **_mirrored(start, seed)}
        frozen = factors.select(start, self._stays)
        return {self._still: frozen, "adapter": {n: t for n, t in start.items() if n not in frozen}}

    def broadcast(self, state: Payload) -> Broadcast:
        still = {self._still: state[self._still]}
        return Broadcast({"adapter": state["adapter"]}, cached=still)

    def local(self, client: Client, received: Payload) -> Update:
        start, still = received["adapter"], received[self._still]
        fit = client.trainer.fit({**still, **start}, train=lambda n: n not in still)
        trained = {name: fit.params[name] for name in start}
        return Update({"adapter": tree.sub(trained, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": {n: t for n, t in fresh.items() if not self._stays(n)}}

    def aggregator(self) -> Aggregator:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {**state, "adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter({**state[self._still], **state["adapter"]})

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        if self.train == "A":
            return [Cost(4 * (s.trained.A + s.head), 4 * (s.A + s.head), 4 * s.B) for s in cohort]
        return [Cost(4 * (s.trained.B + s.head), 4 * (s.B + s.head), 4 * s.A) for s in cohort]

    @property
    def _still(self) -> str:
        """The factor that stays, which is the name of its group."""
        return "A" if self.train == "B" else "B"

    def _stays(self, name: str) -> bool:
        return factors.is_a(name) if self.train == "B" else factors.is_b(name)


def _mirrored(start: Params, seed: int) -> Params:
    """Factors of modules with B = 0 the other way round: A zero, B uniform as A is for Wᵀ."""
    found: dict[str, Tensor] = {}
    for module in factors.modules(start):
        a, b = start[module + factors.A], start[module + factors.B]
        if not b.any():
            uniform = torch.rand(b.shape, generator=seeds.generator(seed, "B", module))
            found[module + factors.B] = (2 * uniform - 1) / len(b) ** 0.5
            found[module + factors.A] = torch.zeros_like(a)
    return found
