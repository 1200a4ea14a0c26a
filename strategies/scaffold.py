"""SCAFFOLD: local steps corrected by control variates.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv 1910.06378.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.aggregation.sums import ByGroup, Sum, WeightedMean
from corolla.interfaces import Client
from corolla.strategies.listing.mark import listed
from corolla.tensors import tree
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
class Scaffold:
    """Local steps follow g - c_m + c; then c_m ← c_m - c + (x - y_m) / Σ lr (option II).

    c = (1 / N) Σ c_m over all N clients: each sends its change of c_m, divided by N, beside its
    update. c_m stays on the device. Derived for SGD: with AdamW (x - y_m) / Σ lr is no mean
    gradient, so that combination is refused. Twice FedAvg's bytes, and clients with a memory.
    Clipping of gradients (clip_norm) bounds the corrected gradient and what c_m learns. Moves are
    weighted by examples and c is not, as in the paper: with clients of unequal size the corrected
    steps are those of the uniform objective.
    """

    name: ClassVar[str] = "scaffold"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    keeps: ClassVar[bool] = True
    mirrors: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    optimizers: ClassVar[tuple[str, ...]] = ("sgd",)
    when: ClassVar[str] = "SGD on unlike data, with clients that come back: a baseline"

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": start, "control": tree.scale(start, 0.0)}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start, shared = received["adapter"], received["control"]
        own = client.kept.get("control", tree.scale(start, 0.0))
        shift = tree.sub(shared, own)
        fit = client.trainer.fit(
            start, correct=lambda g, w: {n: t + shift[n].to(t) for n, t in g.items()}
        )
        moved = tree.sub(fit.params, start)
        after = tree.sub(tree.scale(shift, -1.0), tree.scale(moved, 1 / fit.distance))
        change = tree.scale(tree.sub(after, own), 1 / client.population)
        payload = {"adapter": moved, "control": change}
        return Update(payload, fit.num_examples, fit.metrics, keep={"control": after})

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": fresh, "control": fresh}

    def aggregator(self) -> ByGroup:
        return ByGroup({"adapter": WeightedMean(), "control": Sum()})

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {group: tree.add(state[group], aggregate[group]) for group in state}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["adapter"])

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=8 * n, down=8 * n) for n in (s.A + s.B + s.head for s in cohort)]
