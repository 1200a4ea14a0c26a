"""FedKSeed: full-parameter tuning with K seeds and scalar gradients.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from corolla import seeds
from corolla.aggregation.sums import SeedSums
from corolla.directions import pools, seedlog, signs
from corolla.directions.pools import GaussianPool, SignPool
from corolla.interfaces import Aggregator, Client
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Cost,
    Metrics,
    Move,
    Params,
    Payload,
    Size,
    TrainerName,
    Update,
)


@listed
@dataclass(frozen=True)
class FedKSeed:
    """w = w_0 + Σ_k G_k z_k with the same `size` directions in all rounds.

    Clients send (k, g) for each query; G_k += Σ_m p_m step_m Σ_{t: k_t = k} g_mt (equation 6 with
    weights by examples), where step = -lr / queries is that of the round: a learning rate that
    changes is no contradiction. The server sends all G_k and the seed of the pool, always: a client
    may forget everything.

    With `directions` "gaussian" (the paper) every replay draws up to `size` random numbers for each
    weight; with "sign" it is one pass over the weights.
    """

    name: ClassVar[str] = "fedkseed"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("zeroth_order",)
    full: ClassVar[bool] = True
    updates: ClassVar[str] = "scalars"
    when: ClassVar[str] = "forward passes only, as published; clients may forget everything"

    size: int = option(4096, "The number of directions of all rounds, a power of two.", 8192)
    directions: Literal["gaussian", "sign"] = option(
        "gaussian", "How directions are drawn: Gaussian, or signs, which replay faster.", "sign"
    )

    def __post_init__(self) -> None:
        pools.check_power_of_two(self.size)
        pools.check_kind(self.directions)

    def init(self, start: Params, seed: int) -> Payload:
        key = torch.tensor(seeds.derive(seed, "directions"))
        return {"start": start, "sums": {"scalars": torch.zeros(self.size), "seed": key}}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast({"sums": state["sums"]}, log=())

    def local(self, client: Client, received: Payload) -> Update:
        at = self.adapter(received)
        chosen = signs.choices(client.seed, client.forward.queries, self.size)
        walk = client.forward.walk(at.trained, at.moves, self._pool(received), chosen.tolist())
        scalars = seedlog.upload(walk, directions=torch.from_numpy(chosen).int())
        return Update({"scalars": scalars}, walk.num_examples, walk.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"scalars": seedlog.upload_like(size, torch.float32, self.size)}

    def aggregator(self) -> Aggregator:
        return SeedSums(self.size)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        sums = state["sums"]["scalars"].double() + aggregate["scalars"]["scalars"]
        used = float((sums != 0).sum())
        return {**state, "sums": {**state["sums"], "scalars": sums.float()}}, {"directions": used}

    def adapter(self, state: Payload) -> Adapter:
        sums = state["sums"]["scalars"]
        moves = (Move(self._pool(state), sums),) if bool(sums.any()) else ()
        return Adapter(state["start"], moves=moves)

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(8 * s.scalars + 4, 4 * self.size + 4, at_most=True) for s in cohort]

    def _pool(self, state: Payload) -> GaussianPool | SignPool:
        return pools.pool(self.directions, self.size, int(state["sums"]["seed"]))
