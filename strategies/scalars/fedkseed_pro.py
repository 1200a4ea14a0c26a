"""FedKSeed-Pro: FedKSeed that prefers seeds along which the loss has changed more.

Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353, section 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla import seeds
from corolla.aggregation.history import SumsAndHistory
from corolla.directions import seedlog, signs
from corolla.interfaces import Client
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.strategies.scalars.fedkseed import FedKSeed
from corolla.types import Broadcast, Cost, Metrics, Params, Payload, Size, Update


@listed
@dataclass(frozen=True)
class FedKSeedPro(FedKSeed):
    """FedKSeed with p_k ∝ exp(normalised mean of |g_k|), equations 8 to 10.

    The mean of |clip(g, ±1000)| of each seed over all rounds is scaled to [0, 1] and goes through
    a softmax: no seed is more than e times as likely as another. The server needs sums and counts
    only, so all of it is linear. Seeds that were never used take the mean of those that were; the
    paper's zero would hold them down for ever.
    """

    name: ClassVar[str] = "fedkseed_pro"
    when: ClassVar[str] = "FedKSeed with fewer directions, those that matter preferred"

    size: int = option(1024, "The number of directions of all rounds, a power of two.", 2048)

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

    def aggregator(self) -> SumsAndHistory:
        return SumsAndHistory(self.size)

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after = {
            group: {**state[group], "scalars": _plus(state, aggregate, group)}
            for group in ("sums", "magnitudes", "counts")
        }
        used = float((after["counts"]["scalars"] != 0).sum())
        return {**state, **after}, {"directions": used}

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(8 * s.scalars + 4, 8 * self.size + 4, at_most=True) for s in cohort]


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
