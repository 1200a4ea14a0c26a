"""Mixed federation: some clients backpropagate, others only run forward passes, in one round.

First-order clients follow FedAvg on LoRA (Zhang et al., ICASSP 2024, arXiv 2305.05644),
zeroth-order clients send scalars along seeded directions as in FedKSeed (Qin et al., ICML 2024,
arXiv 2312.06353); how they are combined is ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from corolla import seeds
from corolla.aggregation.two_classes import Spread, TwoMeans
from corolla.directions import moving, pools, seedlog, signs
from corolla.directions.pools import SignPool
from corolla.interfaces import Client, Observed
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import tree
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

_BOTH: tuple[TrainerName, ...] = ("first_order", "zeroth_order")


@listed
@dataclass(frozen=True)
class Mixed:
    """w ← w + λ_1 ū_1 + λ_0 ū_0, the mean updates of the first- and the zeroth-order clients.

    All work on the same LoRA tensors. A zeroth-order client sends kilobytes of scalars and receives
    whole adapters; the server rebuilds ū_0 = Σ_k a_k z_k from its seeds, sign-Hadamard directions
    that are new in each round, with a transform and one pass. Each ū is weighted by examples. With
    `weights`

    - "examples": λ_c = n_c / Σ n, so that w moves by the mean over all clients;
    - "inverse_variance": λ_c ∝ |ū_c|² / v_c, where v_c = s_c² Σp² / (1 - Σp²) estimates the
      variance of ū_c from the spread s_c² = Σ_m p_m |u_m - ū_c|² of its clients. Relative to
      |ū_c|², or the class with the smaller learning rate would always seem the surer one. A round
      in which a class has fewer than two clients falls back to "examples". (--keep-updates notes
      weights by examples in any case.)

    Config: `classes`, each with a `trainer`; both trainers must occur.
    """

    name: ClassVar[str] = "mixed"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = _BOTH
    full: ClassVar[bool] = False
    when: ClassVar[str] = "clients that backpropagate beside clients that cannot"

    size: int = option(4096, "The number of directions of a round, a power of two.", 8192)
    weights: Literal["examples", "inverse_variance"] = option(
        "examples",
        "How the two classes count: by examples, or by how sure their mean updates are.",
        "inverse_variance",
    )

    def __post_init__(self) -> None:
        pools.check_power_of_two(self.size)
        if self.weights not in ("examples", "inverse_variance"):
            raise ValueError(
                f"weights must be examples or inverse_variance, found {self.weights!r}"
            )

    def init(self, start: Params, seed: int) -> Payload:
        key = torch.tensor([seeds.derive(seed, "directions"), 1])
        return {"adapter": start, "key": {"key": key}}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        if client.kind == "first_order":
            fit = client.trainer.fit(start)
            return Update({"adapter": tree.sub(fit.params, start)}, fit.num_examples, fit.metrics)
        chosen = signs.choices(client.seed, client.forward.queries, self.size)
        walk = client.forward.walk(start, (), self._pool(received), chosen.tolist())
        scalars = seedlog.upload(walk, seed=torch.tensor(client.seed))
        return Update({"scalars": scalars}, walk.num_examples, walk.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        if size.trainer == "first_order":
            return {"adapter": fresh}
        return {"scalars": seedlog.upload_like(size, torch.float32)}

    def aggregator(self) -> TwoMeans:
        return TwoMeans(self.size)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        flat, layout = moving.flatten(state["adapter"])
        first, _ = moving.flatten(aggregate["adapter"]) if aggregate["adapter"] else (None, ())
        sums = aggregate["scalars"]["scalars"]
        n_1, n_0 = (float(n) for n in aggregate["counts"]["examples"])
        share_1, share_0 = n_1 / (n_1 + n_0), n_0 / (n_1 + n_0)
        precisions = _precisions(aggregate, len(flat))
        if self.weights == "inverse_variance" and precisions:
            share_1, share_0 = (precision / sum(precisions) for precision in precisions)
        moving.apply(flat, 0, [Move(self._pool(state), sums, share_0)])
        if first is not None:
            flat += share_1 * first
        key = state["key"]["key"] + torch.tensor([0, 1])  # new signs in the next round
        after = {"adapter": moving.unflatten(flat, layout), "key": {"key": key}}
        return after, {"first_order_share": share_1, "zeroth_order_share": share_0}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["adapter"])

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        costs = []
        for s in cohort:
            whole = 4 * (s.A + s.B + s.head)
            up = whole if s.trainer == "first_order" else 4 * s.scalars + 8
            costs.append(Cost(up, whole + 16))
        return costs

    @property
    def weighted(self) -> bool:
        """True where a client counts by its examples alone."""
        return self.weights == "examples"

    def shares(self, observed: Observed) -> Mapping[str, float]:
        """λ_c n_m / n_c, written out client by client.

        |u|² of a zeroth-order client is (number of values) · |a|², as where its directions are
        orthogonal.
        """
        if self.weights == "examples":
            return observed.weights
        values, names = sum(t.numel() for t in observed.start.values()), sorted(observed.start)
        first, zeroth = Spread(), Spread()
        for client, p in observed.weights.items():
            own = observed.updates[client]
            if "adapter" in own:
                flat = torch.cat([own["adapter"][n].double().flatten() for n in names])
                first.clients[client] = (p, flat)
                continue
            vector = torch.zeros(self.size, dtype=torch.float64)
            where = seedlog.directions(own["scalars"], self.size).tolist()
            for k, g in zip(where, own["scalars"]["scalars"].tolist(), strict=True):
                vector[k] += g * float(own["scalars"]["step"]) * values**0.5
            zeroth.clients[client] = (p, vector)
        sure = first.precision, zeroth.precision
        if not all(0 < s < math.inf for s in sure):
            return observed.weights
        return {
            client: precision / sum(sure) * p / spread.total
            for spread, precision in zip((first, zeroth), sure, strict=True)
            for client, (p, _) in spread.clients.items()
        }

    def _pool(self, state: Payload) -> SignPool:
        seed, round = state["key"]["key"].tolist()
        return SignPool(self.size, (seed, round))


def _precisions(aggregate: Payload, values: int) -> tuple[float, float] | None:
    """|ū_c|² / v_c of both classes; None when a class has too few clients to tell."""
    counts = aggregate["counts"]
    if any(int(clients) < 2 for clients in counts["clients"]):
        return None
    first = sum(float(t.double().square().sum()) for t in aggregate["adapter"].values())
    # |Σ_k a_k z_k|² = values · |a|² inside full blocks, where directions are orthogonal.
    zeroth = values * float(aggregate["scalars"]["scalars"].square().sum())
    squares = (float(counts["squares"][0]), float(counts["squares"][1]) * values)
    found = []
    for mean, square, shares in zip((first, zeroth), squares, counts["shares"], strict=True):
        variance = (square - mean) * float(shares) / (1 - float(shares))
        if not (variance > 0 and math.isfinite(variance) and mean > 0):
            return None
        found.append(mean / variance)
    return found[0], found[1]
