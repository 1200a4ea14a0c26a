"""Subsets of the trained tensors, one for each round: how they are chosen, and what is noted.

The notes have one number for each unit, in the order of their names.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from corolla import seeds
from corolla.tensors import tree, units
from corolla.types import Params, Payload

Way = Literal["random", "half", "suffix", "change"]
LEAST = 1e-12
"""The least norm that a change is relative to: a bias may start at zero."""

Units = Mapping[str, Sequence[str]]
"""Unit → its tensors."""


@dataclass(frozen=True)
class Choice:
    """The way to choose the subset of a round among units. Raises ValueError for what is none."""

    layers: int
    """Blocks of a round; of no effect with "half"."""
    way: Way
    always: Sequence[str]
    """Units outside of blocks that are in each subset."""
    every: int
    """Rounds for which a subset holds."""

    def __post_init__(self) -> None:
        for name, number in (("layers", self.layers), ("every", self.every)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, found {number}")
        if self.way not in get_args(Way):
            raise ValueError(f"choose must be {_or(get_args(Way))}, found {self.way!r}")
        if not set(self.always) <= set(units.OUTSIDE):
            raise ValueError(f"always is a list of {_or(units.OUTSIDE)}, found {self.always!r}")

    def units(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Unit → its tensors, of all trained tensors."""
        return units.of(names, modules=self.way == "half")

    def first(self, own: Units, seed: int, known: bool) -> Params:
        """The notes before the first round; `known`: clients can make all tensors by themselves."""
        zeros = torch.zeros(len(own), dtype=torch.uint8)
        notes = {"seed": torch.tensor([seed, 0]), "sent": zeros if known else zeros + 1}
        if self.way == "change":
            notes["change"] = torch.full((len(own),), -1.0)
        return self._next(own, notes, zeros)

    def after(self, state: Payload, notes: Params, moved: Params) -> Params:
        """The notes of the next round; `state` has the units before this one, `moved` changes.

        The change of a unit is ‖w' - w‖ / ‖w‖ over its tensors, in fp64, rounded once.
        """
        own, chosen = {unit: tuple(params) for unit, params in state.items()}, notes["chosen"]
        found = {**notes, "sent": notes["sent"] | chosen}
        if self.way == "change":
            found["change"] = notes["change"].clone()
            for i, unit in enumerate(sorted(own)):
                if chosen[i]:
                    change = tree.norm({n: moved[n] for n in own[unit] if n in moved})
                    found["change"][i] = change / max(tree.norm(state[unit]), LEAST)
        return self._next(own, found, chosen)

    def most(self, names: Collection[str], number: int) -> tuple[Sequence[int], list[str]]:
        """The blocks, of so many, that take most memory in a round, and the trained tensors.

        Blocks that are drawn are not known before; the deepest have the longest backward pass.
        """
        own, count = self.units(names), min(self.layers, number)
        picked = units.always(own, self.always)
        which = range(number - count, number) if self.way == "suffix" else range(count)
        if self.way == "half":
            which = range(number)
            picked |= units.half(own, seeds.generator(0, "subset"))
        else:
            picked |= set(units.blocks(own)[which.start : which.stop])
        return which, [name for unit in sorted(picked) for name in own[unit]]

    def _next(self, own: Units, notes: Params, last: Tensor) -> Params:
        """The notes of a round, before which `last` was trained."""
        seed, round = notes["seed"].tolist()
        chosen = last
        if round % self.every == 0:
            wanted = self._drawn(own, notes, seeds.generator(seed, "subset", round // self.every))
            wanted |= units.always(own, self.always)
            chosen = torch.tensor([unit in wanted for unit in sorted(own)], dtype=torch.uint8)
        return {**notes, "seed": torch.tensor([seed, round + 1]), "chosen": chosen, "last": last}

    def _drawn(self, own: Units, notes: Params, generator: torch.Generator) -> set[str]:
        there = sorted(units.blocks(own))
        if self.way == "half":
            return units.half(own, generator)
        if self.way == "suffix":
            return set(there[-self.layers :])
        if self.way == "random":
            order = torch.randperm(len(there), generator=generator).tolist()
            return {there[i] for i in order[: self.layers]}
        changes = dict(zip(sorted(own), notes["change"].tolist(), strict=True))
        before = {unit: -changes[unit] if changes[unit] >= 0 else -math.inf for unit in there}
        return set(sorted(there, key=lambda unit: (before[unit], unit))[: self.layers])


def marked(names: Iterable[str], marks: Tensor) -> list[str]:
    """Returns the units whose mark is not 0, in the order of their names."""
    return [name for name, mark in zip(sorted(names), marks.tolist(), strict=True) if mark]


def joined(state: Payload) -> dict[str, Tensor]:
    """Returns the tensors of all units."""
    return {name: tensor for unit in sorted(state) for name, tensor in state[unit].items()}


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
