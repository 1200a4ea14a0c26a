"""Fisher merging: a mean, coordinate by coordinate, of those clients that depend on it.

Zhang et al., "FedNano: Toward Lightweight Federated Tuning for Pretrained Multimodal Large Language
Models", 2025, arXiv 2506.14824; the merge is that of Matena and Raffel, "Merging Models with
Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corolla.interfaces import Client, Observed
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.tensors import tree
from corolla.types import Aggregates, Cost, Metrics, Params, Payload, Size, Update

FLOOR = 1e-8
"""Share of the mean over a tensor that is added to its denominators: some are 0."""


@listed
@dataclass(frozen=True)
class FisherMerge(FedAvg):
    """w ← w + Σ p_m F_m (w_m - w) / Σ p_m F_m by coordinate, F_m the diagonal Fisher information.

    A client of the loss h_m / 2 |w - c_m|² has F_m = h_m, and the merge of such optima is the
    minimiser of Σ p_m loss_m; their mean is not. F_m is the mean of the squared gradients of its
    local steps, before they are clipped, which asks for no other pass: those of batches, smaller
    than of single examples by about the batch size, so that all clients need the same (one with
    fewer examples than a batch counts for more). A coordinate that nobody has a gradient of stays:
    A in the first step, where B is 0. F is not the same for (B R, R⁻¹ A), and tells of the data as
    gradients do. Twice FedAvg's bytes up.
    """

    name: ClassVar[str] = "fisher"
    aggregates: ClassVar[Aggregates] = "other"
    bounded: ClassVar[bool] = False
    squares: ClassVar[bool] = True
    stale: ClassVar[bool] = False
    when: ClassVar[str] = "FedAvg on unlike data, where clients depend on different coordinates"

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        squares: dict[str, Tensor] = {}
        steps = 0

        def note(gradients: Params, weights: Params) -> Params:
            nonlocal steps
            steps += 1
            for name, gradient in gradients.items():
                square = gradient.detach().float().square()
                squares[name] = squares[name] + square if name in squares else square
            return gradients

        fit = client.trainer.fit(start, correct=note)
        fisher = {
            n: squares[n].to(t) / steps if n in squares else torch.zeros_like(t)
            for n, t in start.items()
        }
        weighted = {n: fisher[n] * move for n, move in tree.sub(fit.params, start).items()}
        payload = {"weighted": weighted, "fisher": fisher}
        return Update(payload, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"weighted": fresh, "fisher": fresh}

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        moves = {
            name: _ratio(weighted.double(), aggregate["fisher"][name].double()).to(weighted)
            for name, weighted in aggregate["weighted"].items()
        }
        return {"adapter": tree.add(state["adapter"], moves)}, {}

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=8 * s.trained.values, down=4 * s.values) for s in cohort]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """The merge of what clients hold after training, by the Fisher information they sent."""
        last = rounds[-1]
        found: dict[str, Tensor] = {}
        for name, start in last.start.items():
            parts = [
                (p * last.updates[c]["fisher"][name].double(), last.trained[c][name].double())
                for c, p in last.weights.items()
                if name in last.updates[c]["fisher"]
            ]
            total = torch.stack([f for f, _ in parts]).sum(0)
            wanted = torch.stack([f * held for f, held in parts]).sum(0)
            still = (FLOOR * total.mean()).clamp(min=1e-300)  # all may be 0
            found[name] = (wanted + still * start.double()) / (total + still)
        return found


def _ratio(weighted: Tensor, fisher: Tensor) -> Tensor:
    """Weighted / fisher, and 0 where nobody has any Fisher information (or a negative one)."""
    found = weighted / (fisher + FLOOR * fisher.mean())
    return torch.where(fisher > 0, found, torch.zeros_like(found))
