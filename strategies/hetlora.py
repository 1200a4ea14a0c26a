"""HetLoRA: clients of different ranks share one padded adapter.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024, arXiv 2401.06432.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla.aggregation.padded import NormWeighted
from corolla.aggregation.sums import ByGroup, WeightedMean
from corolla.interfaces import Client, Observed
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Correct,
    Cost,
    LoraSpec,
    Metrics,
    Params,
    Payload,
    Size,
    TrainerName,
    Update,
)


@listed
@dataclass(frozen=True)
class HetLora:
    """A client trains the first r_m rows of A and columns of B; the server averages padded factors.

    In each module client m counts |B_m A_m|_F / Σ |B A|_F ("sparsity weights"), from r by r
    matrices. With `normalise` a row is the mean over the clients that have it, else missing rows
    count as zeros, as in the paper, and the tail shrinks. The factors that travel carry √(alpha /
    r) each, so that different scalings agree.

    Local loss: + `penalty` · |A[γ r:]| · |B[:, γ r:]|, γ = `keep`. Where that product has fallen,
    the client drops its tail for good: from its next round on its rank is γ r, and it sends zeros
    (rank self-pruning; the rank stays on the device). penalty = 0 does neither.
    """

    name: ClassVar[str] = "hetlora"
    aggregates: ClassVar[Aggregates] = "other"
    mixed_ranks: ClassVar[bool] = True
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False
    updates: ClassVar[str] = "values"
    individual: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    keeps: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    when: ClassVar[str] = "a baseline for different ranks: FLoRA and FlexLoRA average products"

    penalty: float = option(
        1e-3, "The weight of the penalty on the last rows of the factors; 0: no pruning.", 1e-2
    )
    keep: float = option(
        0.99, "The part of its rank that a client keeps when it prunes itself.", 0.9
    )
    normalise: bool = option(
        False, "Whether a row is the mean over the clients that have it alone.", True
    )

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and 0 < self.keep < 1):
            raise ValueError(
                f"needs penalty >= 0 and 0 < keep < 1, found {self.penalty} and {self.keep}"
            )

    def init(self, start: Params, seed: int) -> Payload:
        return {
            "global": factors.select(start, factors.is_a, factors.is_b),
            "head": factors.select(start, factors.is_head),
        }

    def broadcast(self, state: Payload) -> Broadcast:
        def fitted(lora: LoraSpec) -> Payload:
            first = _first(state["global"], lora.rank)
            return {"adapter": tree.scale(first, lora.scaling**-0.5)}

        return Broadcast({"head": state["head"]}, fitted=fitted)

    def local(self, client: Client, received: Payload) -> Update:
        rank = client.lora.rank
        if "rank" in client.kept:
            rank = int(client.kept["rank"]["rank"])
        start = {**_cut(received["adapter"], rank), **received["head"]}
        tail = int(self.keep * rank)
        pull = self._pull(tail) if self.penalty and tail else None
        fit = client.trainer.fit(start, correct=pull)
        trained = factors.select(fit.params, factors.is_a, factors.is_b)
        if self.penalty and tail and _tail(trained, tail) < _tail(start, tail):
            rank = tail
        payload = {
            "factors": tree.scale(trained, client.lora.scaling**0.5),
            "head": {n: fit.params[n] - tensor for n, tensor in received["head"].items()},
        }
        keep = {"rank": {"rank": torch.tensor(rank)}}
        return Update(payload, fit.num_examples, {**fit.metrics, "own_rank": float(rank)}, keep)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {
            "factors": factors.select(fresh, factors.is_a, factors.is_b),
            "head": factors.select(fresh, factors.is_head),
        }

    def aggregator(self) -> ByGroup:
        return ByGroup({"factors": NormWeighted(self.normalise), "head": WeightedMean()})

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after: dict[str, Tensor] = {}
        for name, old in state["global"].items():
            new = aggregate["factors"][name]
            rows, columns = new.shape
            after[name] = old.clone()  # beyond the largest rank of the cohort
            after[name][:rows, :columns] = new
        return {"global": after, "head": tree.add(state["head"], aggregate["head"])}, {}

    def adapter(self, state: Payload) -> Adapter:
        if "adapter" in state:  # what a client has received
            return Adapter({**state["adapter"], **state["head"]})
        return Adapter(state["head"], frozen=(state["global"],))

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * n, down=4 * n) for n in (s.A + s.B + s.head for s in cohort)]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Row by row and column by column, with dense norms."""
        last = rounds[-1]
        found = factors.mean(last.trained, last.weights, factors.is_head)
        for m in factors.modules(last.start):
            norms = {
                c: float(last.lora[c].scaling * factors.product(own, m).norm())
                for c, own in last.trained.items()
            }
            a, b = (last.start[m + role].double().clone() for role in (factors.A, factors.B))
            for j in range(max(last.lora[c].rank for c in last.trained)):
                having = [
                    c
                    for c, own in last.trained.items()
                    if j < last.lora[c].rank
                    and bool(own[m + factors.A][j].any() or own[m + factors.B][:, j].any())
                ]
                total = sum(norms[c] for c in (having if self.normalise else last.trained))
                for values, role, axis in ((a, factors.A, 0), (b, factors.B, 1)):
                    values.select(axis, j).zero_()
                    for c in having:
                        share = norms[c] / total * (last.lora[c].scaling / last.spec.scaling) ** 0.5
                        own = last.trained[c][m + role].double()
                        values.select(axis, j).add_(share * own.select(axis, j))
            found[m + factors.A], found[m + factors.B] = a, b
        return found

    def _pull(self, tail: int) -> Correct:
        def correct(gradients: Params, weights: Params) -> Params:
            """Adds the gradient of penalty · |A[tail:]| · |B[:, tail:]|."""
            changed = dict(gradients)
            for module in factors.modules(weights):
                a, b = weights[module + factors.A][tail:], weights[module + factors.B][:, tail:]
                na, nb = a.norm().clamp(min=1e-12), b.norm().clamp(min=1e-12)
                for name, part, other, own in (
                    (module + factors.A, a, nb, na),
                    (module + factors.B, b, na, nb),
                ):
                    if name in changed:
                        extra = torch.zeros_like(weights[name])
                        where = extra[tail:] if factors.is_a(name) else extra[:, tail:]
                        where.copy_(self.penalty * other / own * part)
                        changed[name] = changed[name] + extra
            return changed

        return correct


def _first(params: Params, rank: int) -> dict[str, Tensor]:
    return {n: t[:rank] if factors.is_a(n) else t[:, :rank] for n, t in params.items()}


def _cut(params: Params, rank: int) -> Params:
    """The same shapes with zeros from row and column `rank`: they stay zero in training."""
    out = {n: t.clone() for n, t in params.items()}
    for name, tensor in out.items():
        (tensor[rank:] if factors.is_a(name) else tensor[:, rank:]).zero_()
    return out


def _tail(params: Params, tail: int) -> float:
    """Σ over modules of |A[tail:]| · |B[:, tail:]|."""
    return sum(
        float(params[m + factors.A][tail:].norm() * params[m + factors.B][:, tail:].norm())
        for m in factors.modules(params)
    )
