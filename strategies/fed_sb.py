"""Fed-SB: a small matrix between frozen factors.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025, arXiv 2502.15436; the start from gradients: Ponkshe et
al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning" (LoRA-SB), 2024, arXiv 2411.19557.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla import seeds
from corolla.aggregation.sums import WeightedMean
from corolla.interfaces import Client
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
class FedSb:
    """W + s B R A with orthonormal, frozen B and A: only R (r, r) is trained, sent and averaged.

    Exact: Σ p_m s B R_m A = s B (Σ p_m R_m) A. Bytes do not depend on the model's width, so that
    ranks of 64 to 200 are usual. B and A travel once. They are those of the run's start: with
    `start="gradient"` the singular vectors of a gradient on public data, and R their singular
    values, as LoRA-SB; else random, with R = 0, which learns far more slowly.
    """

    name: ClassVar[str] = "fed_sb"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    partial: ClassVar[str] = "absent"
    when: ClassVar[str] = "fewest bytes with backpropagation, at a large rank; suits DP"

    def init(self, start: Params, seed: int) -> Payload:
        basis: dict[str, Tensor] = {}
        cores: dict[str, Tensor] = {}
        for module, u, s, vt in factors.svd(start):
            if not s.any():  # the usual start, B = 0
                u = _orthonormal(start[module + factors.B].shape, seed, module)
            basis[module + factors.B], basis[module + factors.A] = u.float(), vt.float()
            cores[module + factors.R] = torch.diag(s).float()
        return {"basis": basis, "adapter": {**cores, **factors.select(start, factors.is_head)}}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"adapter": state["adapter"]}, cached={"basis": state["basis"]})

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        everything = {**received["basis"], **start}
        fit = client.trainer.fit(everything, train=lambda name: not factors.is_b(name))
        trained = {name: fit.params[name] for name in start}
        return Update({"adapter": tree.sub(trained, start)}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        cores = {m + factors.R: fresh[m + factors.A] for m in factors.modules(fresh)}
        cores = {name: a.new_zeros(len(a), len(a)) for name, a in cores.items()}
        return {"adapter": {**cores, **factors.select(fresh, factors.is_head)}}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {**state, "adapter": tree.add(state["adapter"], aggregate["adapter"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        trained = dict(factors.select(state["adapter"], factors.is_head))
        for module in factors.modules(state["basis"]):
            r, a = state["adapter"][module + factors.R], state["basis"][module + factors.A]
            trained[module + factors.A] = r @ a
            trained[module + factors.B] = state["basis"][module + factors.B]
        return Adapter(trained)

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        costs = []
        for s in cohort:
            up, down = (4 * (own.modules * s.rank**2 + s.head) for own in (s.trained, s))
            costs.append(Cost(up, down, once=4 * (s.A + s.B)))
        return costs


def _orthonormal(shape: torch.Size, seed: int, module: str) -> Tensor:
    """(out, r) with orthonormal columns, the same on every machine but for its last bits."""
    normal = torch.randn(shape, generator=seeds.generator(seed, "B", module), dtype=torch.float64)
    q: Tensor = torch.linalg.qr(normal).Q
    return q
