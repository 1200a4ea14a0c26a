"""The sign-Hadamard seed pool: zeroth-order updates that replay in one pass over the weights.

After FedKSeed (Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353), with other directions: z_k =
D · H_k, random signs D that are new in each round times row k of a Hadamard matrix. The steps are
those of MeZO (Malladi et al., NeurIPS 2023, arXiv 2305.17333).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from corolla.aggregation.sums import SeedSums
from corolla.directions import pools, seedlog, signs
from corolla.interfaces import Client
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
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
class SeedPool:
    """Clients send a scalar for each query, the server one row of `size` sums for each round.

    A client's queries follow from its seed: k_t = word t of the sign stream, mod `size`. The server
    sums a_k = Σ_m p_m step_m Σ_{t: k_t = k} g_mt, and everybody moves by Σ_k a_k z_k: a fast
    Walsh-Hadamard transform of a, then one pass over the weights for any `size`. This is the mean
    of the clients' trained tensors, up to the rounding of a to `scalars`.

    Who missed rounds receives their rows, or the weights where these are fewer bytes.
    """

    name: ClassVar[str] = "seed_pool"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("zeroth_order",)
    full: ClassVar[bool] = True
    updates: ClassVar[str] = "scalars"
    rebases: ClassVar[bool] = True
    when: ClassVar[str] = "forward passes only: kilobytes, and a replay in one pass"

    size: int = option(512, "The number of directions of a round, a power of two.", 1024)
    scalars: Literal["fp16", "fp32"] = option(
        "fp16", "The type of the numbers that travel.", "fp32"
    )

    def __post_init__(self) -> None:
        pools.check_power_of_two(self.size)
        if self.scalars not in ("fp16", "fp32"):
            raise ValueError(f"scalars must be fp16 or fp32, found {self.scalars!r}")

    @property
    def rounding(self) -> float:
        return 2.0**-11 if self.scalars == "fp16" else 0.0

    def init(self, start: Params, seed: int) -> Payload:
        return seedlog.first_state(start, seed)

    def broadcast(self, state: Payload) -> Broadcast:
        return seedlog.broadcast(state, self.size)

    def local(self, client: Client, received: Payload) -> Update:
        at = self.adapter(received)
        number = seedlog.next_number(received)
        chosen = signs.choices(client.seed, client.forward.queries, self.size)
        pool = seedlog.pool(received, self.size, number)
        walk = client.forward.walk(at.trained, at.moves, pool, chosen.tolist(), self._dtype)
        scalars = seedlog.upload(walk, seed=torch.tensor(client.seed))
        return Update({"scalars": scalars}, walk.num_examples, walk.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"scalars": seedlog.upload_like(size, self._dtype)}

    def aggregator(self) -> SeedSums:
        return SeedSums(self.size)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        sums = aggregate["scalars"]["scalars"]
        number = seedlog.next_number(state)
        used = float((sums != 0).sum())
        return {**state, row_name(number): seedlog.row(sums, self._dtype)}, {"directions": used}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["start"], moves=seedlog.moves(state, self.size))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        width = self._dtype.itemsize
        down = self.size * width + 4
        return [Cost(s.scalars * width + 8, down, at_most=True) for s in cohort]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float16 if self.scalars == "fp16" else torch.float32
