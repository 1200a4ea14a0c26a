"""Ferret: first-order updates, sent as their projections on shared seeded directions.

Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models",
arXiv 2409.06277.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from corolla.aggregation.sums import WeightedMean
from corolla.directions import moving, pools, seedlog, signs
from corolla.interfaces import Client, Observed
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
    row_name,
)


@listed
@dataclass(frozen=True)
class Ferret:
    """γ_k = <z_k, Δ> / size for a client's update Δ; everybody moves by server_lr · Σ_k γ̄_k z_k.

    Unbiased: E[Σ_k γ_k z_k] = Δ over the random signs. The relative error of one reconstruction
    is sqrt(d / size - 1) for d trained values: most of it is noise unless `size` comes near d, so
    steps have to be small. Directions are sign-Hadamard, new in each round and the same for all
    clients, instead of the paper's truncated normals: a projection on all of them is one pass over
    Δ and a transform, and γ̄ is linear. (The paper's released code uses 3 times too small a scale;
    its server_lr hides that.)
    """

    name: ClassVar[str] = "ferret"
    aggregates: ClassVar[Aggregates] = "other"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    updates: ClassVar[str] = "scalars"
    rebases: ClassVar[bool] = True
    when: ClassVar[str] = "backpropagation over a link of kilobytes, in small steps: noisy"

    size: int = option(4096, "The number of directions of a round, a power of two.", 8192)
    server_lr: float = option(1.0, "The learning rate of the server, on what it reconstructs.", 0.5)

    def __post_init__(self) -> None:
        pools.check_power_of_two(self.size)
        if not self.server_lr > 0:
            raise ValueError(f"server_lr must be more than 0, found {self.server_lr}")

    def init(self, start: Params, seed: int) -> Payload:
        return seedlog.first_state(start, seed)

    def broadcast(self, state: Payload) -> Broadcast:
        return seedlog.broadcast(state, self.size)

    def local(self, client: Client, received: Payload) -> Update:
        at = self.adapter(received)
        start = moving.settle(at.trained, at.moves)
        fit = client.trainer.fit(start)
        change, _ = moving.flatten(tree.sub(fit.params, start))
        pool = seedlog.pool(received, self.size, seedlog.next_number(received))
        sums = signs.fwht(signs.fold(change, pool.key, 0, self.size))
        gamma = torch.from_numpy(sums / self.size).float()
        return Update({"projections": {"scalars": gamma}}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"projections": {"scalars": torch.zeros(self.size)}}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        number = seedlog.next_number(state)
        sums = self.server_lr * aggregate["projections"]["scalars"].double()
        return {**state, row_name(number): seedlog.row(sums, torch.float32)}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["start"], moves=seedlog.moves(state, self.size))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(4 * self.size, 4 * self.size + 4, at_most=True) for _ in cohort]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Σ_k z_k z_kᵀ Δ / size written out: D_i Σ_j D_j Δ_j over all j = i mod size.

        Rows of a Hadamard matrix are orthogonal, so that only the signs D of a round remain.
        """
        last = rounds[-1]
        names = sorted(last.start)
        mean = factors.mean(last.trained, last.weights)
        change = torch.cat([(mean[n] - last.start[n].double()).flatten() for n in names])
        key = (int(last.state["key"]["seed"]), len(rounds))
        signed = torch.from_numpy(signs.signs(key, 0, len(change))).double()
        place = torch.arange(len(change)) % self.size
        sums = torch.zeros(self.size, dtype=torch.float64).index_add_(0, place, signed * change)
        move = self.server_lr * signed * sums[place]
        parts = torch.split(move, [last.start[n].numel() for n in names])
        return {
            n: last.start[n].double() + part.reshape(last.start[n].shape)
            for n, part in zip(names, parts, strict=True)
        }
