"""FedKSeed-Pro: FedKSeed that prefers seeds along which the loss has changed more.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353, section 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from corolla import seeds
from corolla.aggregation.sums import SeedSums, summed, summed_like, terms
from corolla.directions import pools, seedlog, signs
from corolla.directions.pools import GaussianPool, SignPool
from corolla.interfaces import Client
from corolla.strategies.listing import listed
from corolla.strategies.options import option
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
class FedKSeedPro:
    """FedKSeed with p_k ∝ exp(normalised mean of |g_k|), equations 8 to 10.

    The mean of |clip(g, ±1000)| of each seed over all rounds is scaled to [0, 1] and goes through
    a softmax: no seed is more than e times as likely as another. The server needs sums and counts
    only, so all of it is linear. Seeds that were never used take the mean of those that were; the
    paper's zero would hold them down for ever.
    """

    name: ClassVar[str] = "fedkseed_pro"
    aggregates: ClassVar[Aggregates] = "factors"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("zeroth_order",)
    full: ClassVar[bool] = True
    updates: ClassVar[str] = "scalars"
    when: ClassVar[str] = "FedKSeed with fewer directions, those that matter preferred"

    size: int = option(1024, "The number of directions of all rounds, a power of two.", 2048)
    directions: Literal["gaussian", "sign"] = option(
        "gaussian", "How directions are drawn: Gaussian, or signs, which replay faster.", "sign"
    )

    def __post_init__(self) -> None:
        pools.check_power_of_two(self.size)
        pools.check_kind(self.directions)

    def init(self, start: Params, seed: int) -> Payload:
        key = torch.tensor(seeds.derive(seed, "directions"))
        return {
            "start": start,
            "sums": {"scalars": torch.zeros(self.size), "seed": key},
            "magnitudes": {"scalars": torch.zeros(self.size)},
            "counts": {"scalars": torch.zeros(self.size)},
        }

    def broadcast(self, state: Payload) -> Broadcast:
        chances = probabilities(state["magnitudes"]["scalars"], state["counts"]["scalars"])
        payload = {"sums": state["sums"], "probabilities": {"scalars": chances.float()}}
        return Broadcast(payload, log=())

    def local(self, client: Client, received: Payload) -> Update:
        at = self.adapter(received)
        chosen = _draw(client.seed, client.forward.queries, received["probabilities"]["scalars"])
        walk = client.forward.walk(at.trained, at.moves, self._pool(received), chosen.tolist())
        scalars = seedlog.upload(walk, directions=chosen.int())
        return Update({"scalars": scalars}, walk.num_examples, walk.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"scalars": seedlog.upload_like(size, torch.float32, self.size)}

    def aggregator(self) -> "_SumsAndHistory":
        return _SumsAndHistory(self.size)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after = {
            group: {**state[group], "scalars": _plus(state, aggregate, group)}
            for group in ("sums", "magnitudes", "counts")
        }
        used = float((after["counts"]["scalars"] != 0).sum())
        return {**state, **after}, {"directions": used}

    def adapter(self, state: Payload) -> Adapter:
        sums = state["sums"]["scalars"]
        moves = (Move(self._pool(state), sums),) if bool(sums.any()) else ()
        return Adapter(state["start"], moves=moves)

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(8 * s.scalars + 4, 8 * self.size + 4, at_most=True) for s in cohort]

    def _pool(self, state: Payload) -> GaussianPool | SignPool:
        return pools.pool(self.directions, self.size, int(state["sums"]["seed"]))


def probabilities(magnitudes: Tensor, counts: Tensor) -> Tensor:
    """p_k from Σ |g_k| and how often k was used: positive, sum 1, ratio at most e. fp64 (K,)."""
    used = counts > 0
    if not bool(used.any()):
        return torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    means = magnitudes.double() / counts.double().clamp(min=1)
    means = torch.where(used, means, means[used].mean())
    spread = means.max() - means.min()
    scaled = (means - means.min()) / spread if bool(spread > 0) else torch.zeros_like(means)
    return torch.softmax(scaled, dim=0)


def _draw(seed: int, count: int, chances: Tensor) -> Tensor:
    """Directions by probability, from the same words as `signs.choices`: int64 (count,)."""
    words = torch.from_numpy((signs.words((seed, 0), 0, count, stream=1) >> 11).astype("int64"))
    heights = chances.double().cumsum(0)
    return torch.searchsorted(heights, words.double() * 2.0**-53 * heights[-1], right=True)


def _plus(state: Payload, aggregate: Payload, group: str) -> Tensor:
    return (state[group]["scalars"].double() + aggregate[group]["scalars"]).float()


_CLIP = 1000.0
_HISTORY = "history"


class _SumsAndHistory:
    """The weighted sums of SeedSums, and Σ |clip(g)| and counts of each seed, unweighted."""

    linear = True

    def __init__(self, size: int) -> None:
        self._moved = SeedSums(size)
        self._magnitudes = torch.zeros(size, dtype=torch.float64)
        self._counts = torch.zeros(size, dtype=torch.float64)

    def add(self, payload: Payload, weight: float) -> None:
        self._moved.add(payload, weight)
        scalars = payload["scalars"]
        where = seedlog.directions(scalars, len(self._counts))
        magnitudes = scalars["scalars"].double().abs().clamp(max=_CLIP)
        self._magnitudes.index_add_(0, where, magnitudes)
        self._counts.index_add_(0, where, (magnitudes > 0).double())  # 0: skipped

    def merge(self, other: Self) -> None:
        self._moved.merge(other._moved)
        self._magnitudes += other._magnitudes
        self._counts += other._counts

    def sums(self) -> Payload:
        return {**self._moved.sums(), **summed({_HISTORY: self._history})}

    def sums_like(self, like: Payload) -> Payload:
        return {**self._moved.sums_like(like), **summed_like({_HISTORY: self._history})}

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        magnitudes, counts = (terms(sums)[_HISTORY][name] for name in self._history)
        measured = weight * len(like["scalars"]["scalars"])
        if not (
            bool(((magnitudes >= 0) & (magnitudes <= _CLIP * counts) & (counts >= 0)).all())
            and float(counts.sum()) <= measured
            and bool((counts == counts.round()).all())
        ):
            raise ValueError("partial aggregate has a history that no updates have")
        self._moved.absorb(sums, weight, like)
        self._magnitudes += magnitudes
        self._counts += counts

    @property
    def _history(self) -> Params:
        return {"magnitudes": self._magnitudes, "counts": self._counts}

    def finalise(self) -> Payload:
        return {
            "sums": self._moved.finalise()["scalars"],
            "magnitudes": {"scalars": self._magnitudes},
            "counts": {"scalars": self._counts},
        }
