"""LISA: federated tuning of a few blocks of a model in each round.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning", NeurIPS 2024, arXiv 2403.17919. Half of each block: Hui et al., "HFT: Half Fine-Tuning
for Large Language Models", ACL 2025, arXiv 2404.18466. The blocks that change most: Ardakani et
al., "SlimFit", arXiv 2305.18513. The last blocks: the usual choice of GreenTrainer (Huang et al.,
ICLR 2024, arXiv 2309.13192).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from corolla import seeds
from corolla.errors import ConfigError
from corolla.interfaces import Client
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree, units
from corolla.tensors.subsets import Choice, joined, marked
from corolla.types import Adapter, Broadcast, Cost, Metrics, Params, Payload, Size, Update

_NOTES = "subset"
"""The group of a state that is no unit: what was chosen, and when."""


@listed
@dataclass(frozen=True)
class Lisa(FedAvg):
    """FedAvg on a subset of the trained tensors, the same for all clients of a round.

    w ← w + Σ p_m (w_m - w) on the subset, all else stays bit for bit. A client's backward pass ends
    at the deepest tensor of the subset, its optimiser has states for these alone. `choose` takes
    from the blocks

    - "random": `layers` of them, each as likely, by the run's seed;
    - "half": half of the modules of each block (HFT), whatever `layers` is;
    - "suffix": the last `layers` in each round: the shortest backward pass;
    - "change": those that were never trained, then the `layers` whose tensors, relative to their
      norms, changed most in the round in which they were trained last.

    Each unit (a block; where halves are drawn, a module) is a cached group: a client receives what
    has changed since it was here last, and nothing of a fresh model.
    """

    name: ClassVar[str] = "lisa"
    stale: ClassVar[bool] = False
    partial: ClassVar[str] = ""
    rebases: ClassVar[bool] = True
    when: ClassVar[str] = "all parameters of a model, at the memory and bytes of a few blocks"

    layers: int = option(2, "The number of blocks that are trained in a round.", 1)
    choose: Literal["random", "half", "suffix", "change"] = option(
        "random", "How the blocks of a round are chosen.", "suffix", {"layers": 1}
    )
    always: Sequence[Literal["embed", "norm", "head"]] = option(
        units.OUTSIDE, "What is trained in each round: embed, norm (the last), head.", ["norm"]
    )
    every: int = option(1, "The number of rounds for which a choice holds.", 2, {"choose": "half"})

    def __post_init__(self) -> None:
        self.choice  # noqa: B018 - raises ValueError for options that are none

    @property
    def choice(self) -> Choice:
        """The way in which the subset of a round is chosen."""
        return Choice(self.layers, self.choose, self.always, self.every)

    def init(self, start: Params, seed: int) -> Payload:
        own = self.choice.units(start)
        state = {unit: {name: start[name] for name in names} for unit, names in own.items()}
        return {**state, _NOTES: self.choice.first(own, seed, _is_fresh(start, seed))}

    def broadcast(self, state: Payload) -> Broadcast:
        notes, own = state[_NOTES], _units(state)
        sent = {unit: own[unit] for unit in marked(own, notes["sent"])}
        return Broadcast({_NOTES: {"chosen": notes["chosen"], "run": notes["seed"][:1]}}, sent)

    def local(self, client: Client, received: Payload) -> Update:
        notes, start = received[_NOTES], joined(_units(received))
        if len(notes["chosen"]) > len(_units(received)):  # never trained: a client can make them
            start = {**client.trainer.init(seeds.derive(int(notes["run"]), "init")), **start}
        own = self.choice.units(start)
        chosen = {n for unit in marked(own, notes["chosen"]) for n in own[unit]}
        fit = client.trainer.fit(start, train=chosen.__contains__)
        moved = {name: fit.params[name] - start[name] for name in sorted(chosen)}
        return Update({"adapter": moved}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        own = self.choice.units(fresh)
        chosen = size.chosen or own
        return {"adapter": {n: fresh[n] for unit in own if unit in chosen for n in own[unit]}}

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        moved, own = aggregate["adapter"], _units(state)
        after = {
            unit: {n: t + moved[n] if n in moved else t for n, t in params.items()}
            for unit, params in own.items()
        }
        return {**after, _NOTES: self.choice.after(own, state[_NOTES], moved)}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(joined(_units(state)))

    def chosen(self, state: Payload) -> Sequence[str]:
        found = marked(_units(state), state[_NOTES]["chosen"])
        if not found:
            raise ConfigError(
                "strategy lisa trains blocks, and what this run trains is in none: use fedavg, or "
                "name what is trained in each round (strategy.always)"
            )
        return found

    def most(self, names: Collection[str], number: int) -> tuple[Sequence[int], list[str]]:
        return self.choice.most(names, number)

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(4 * s.values, 4 * s.values, at_most=True) for s in cohort]

    def cost_from(self, state: Payload, cohort: Sequence[Size]) -> Sequence[Cost]:
        """The subset of the round goes up; that of the round before, which has changed, down.

        A client that missed rounds receives what has changed in them as well.
        """
        own, notes = _units(state), state[_NOTES]
        up, last, sent = (
            sum(tree.count(own[unit]) for unit in marked(own, notes[mark]))
            for mark in ("chosen", "last", "sent")
        )
        return [Cost(4 * up, 4 * last + len(own) + 8, once=4 * (sent - last)) for _ in cohort]


def _units(state: Payload) -> Payload:
    """Returns the units of a state or of a broadcast, where other groups may be beside them."""
    return {unit: params for unit, params in state.items() if units.known(unit)}


def _is_fresh(start: Params, seed: int) -> bool:
    """Returns whether a client can make the start: its factors follow from the run's seed."""
    shapes = {
        m: (len(start[m + factors.B]), start[m + factors.A].shape[1])
        for m in factors.modules(start)
    }
    made = factors.fresh(shapes, factors.rank(start), seeds.derive(seed, "init")) if shapes else {}
    return all(torch.equal(start[name], tensor) for name, tensor in made.items())
