"""FedMeZO: zeroth-order local training of LoRA, averaged as in FedAvg.

Ling et al., "On the Convergence of Zeroth-Order Federated Tuning for Large Language Models", KDD
2024, arXiv 2402.05926.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from corolla.directions.pools import GaussianPool, LowRankPool, SignPool
from corolla.interfaces import Client
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import tree
from corolla.types import Params, Payload, Pool, TrainerName, Update


@listed
@dataclass(frozen=True)
class FedMeZO(FedAvg):
    """FedAvg whose clients take MeZO's steps: a new direction for every query.

    Saves the memory of backpropagation and no bytes: whole adapters travel. Averages A and B apart,
    as FedAvg does. `directions`: "gaussian" as in the paper; "sign", which are cheaper to draw; or
    "low_rank", the matrices U Vᵀ of LOZO (Chen et al., ICLR 2025, arXiv 2410.07698), of rank
    `lozo_rank`, with a new V every `interval` queries.
    """

    name: ClassVar[str] = "fedmezo"
    trainers: ClassVar[tuple[TrainerName, ...]] = ("zeroth_order",)
    stale: ClassVar[bool] = False
    when: ClassVar[str] = "forward passes only, where bytes do not matter"

    directions: Literal["gaussian", "sign", "low_rank"] = option(
        "gaussian",
        "How directions are drawn: Gaussian, signs, or LOZO's matrices of low rank.",
        "low_rank",
    )
    lozo_rank: int = option(
        2, "The rank of directions of low rank.", 4, beside={"directions": "low_rank"}
    )
    interval: int = option(
        50,
        "The number of queries for which one factor of such a direction stays.",
        20,
        beside={"directions": "low_rank"},
    )

    def __post_init__(self) -> None:
        if self.directions not in ("gaussian", "sign", "low_rank"):
            raise ValueError(
                f"directions must be gaussian, sign or low_rank, found {self.directions!r}"
            )
        if self.lozo_rank < 1 or self.interval < 1:
            raise ValueError(f"lozo_rank and interval must be from 1, found {self}")

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        pool = self._pool(client.seed, start)
        walk = client.forward.walk(start, (), pool, range(client.forward.queries))
        return Update({"adapter": tree.sub(walk.params, start)}, walk.num_examples, walk.metrics)

    def _pool(self, seed: int, start: Params) -> Pool:
        if self.directions == "sign":
            return SignPool(1 << 16, (seed, 0))
        if self.directions == "low_rank":
            shapes = tuple(tuple(start[name].shape) for name in sorted(start))
            return LowRankPool(seed, shapes, self.lozo_rank, self.interval)
        return GaussianPool(seed)
