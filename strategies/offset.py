"""A constant block beside the base for a run whose start takes a part out of the base.

With factors (B0, A0) at scaling s a residual start has the model W - s B0 A0 + s B A. Its first
half is the block: it never changes, all hold the same one, and the base stays as it is. Whatever
is exact for a strategy's own factors then is exact for the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

from corolla.interfaces import Choosing, Client, Strategy
from corolla.tensors import factors, tree
from corolla.types import (
    Adapter,
    Broadcast,
    Correct,
    Cost,
    Fit,
    Metrics,
    Params,
    Payload,
    Size,
    Update,
)

GROUP = "start-offset"
"""The group of the block, at scaling 1: in a server's state, and sent once to each client."""

S = TypeVar("S", bound=Strategy)


def block_of(start: Params, scaling: float) -> Params:
    """The block of a start: (-s B0, A0) at scaling 1, so that start and block cancel."""
    own = factors.select(start, factors.is_a, factors.is_b)
    return {name: -scaling * t if factors.is_b(name) else t.clone() for name, t in own.items()}


def planned(there: bool, fresh: Params) -> Payload:
    """The group of a block, of the size that a start of this form makes; none where none is."""
    return {GROUP: factors.select(fresh, factors.is_a, factors.is_b)} if there else {}


def beside(strategy: S) -> S:
    """The strategy with a block beside the base, wherever a state or a broadcast has one."""
    if issubclass(type(strategy), _Offset):
        return strategy
    cls = _class_beside(type(strategy))
    made = cls.__new__(cls)
    whole: Any = strategy
    fields = dataclasses.fields(whole) if dataclasses.is_dataclass(whole) else ()
    own = {
        **{f.name: getattr(strategy, f.name) for f in fields},
        **getattr(strategy, "__dict__", {}),
    }
    for name, value in own.items():
        object.__setattr__(made, name, value)  # of a frozen dataclass too
    return cast(S, made)


@cache
def _class_beside(cls: type[Strategy]) -> type[Strategy]:
    """A subclass: traits, claims and optional halves of the strategy stay its own."""
    own = _Choosing if issubclass(cls, Choosing) else _Offset
    return cast(type[Strategy], type(cls.__name__, (own, cls), {"__module__": cls.__module__}))


class _Offset:
    """The halves of a strategy that must know of the block; the others see a state without it."""

    @property
    def _own(self) -> Any:
        return super()

    def broadcast(self, state: Payload) -> Broadcast:
        sent: Broadcast = self._own.broadcast(_bare(state))
        return replace(sent, cached={**sent.cached, **_kept(state)})

    def local(self, client: Client, received: Payload) -> Update:
        if GROUP in received:
            client = cast(Client, _Member(client, received[GROUP]))
        update: Update = self._own.local(client, _bare(received))
        return update

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = self._own.apply(_bare(state), aggregate)
        return {**after, **_kept(state)}, metrics

    def adapter(self, state: Payload) -> Adapter:
        found: Adapter = self._own.adapter(_bare(state))
        return replace(found, frozen=(*found.frozen, *_kept(state).values()))

    def cost_from(self, state: Payload, cohort: Sequence[Size]) -> Sequence[Cost]:
        """The strategy's price; a client gets the block with the first broadcast of a run."""
        priced = getattr(self._own, "cost_from", None)
        costs = priced(_bare(state), cohort) if priced else self._own.cost(cohort)
        once = 4 * sum(map(tree.count, _kept(state).values()))
        return [replace(cost, once=cost.once + once) for cost in costs]


class _Choosing(_Offset):
    """The same of a strategy that trains a subset of all tensors, which its state says."""

    def chosen(self, state: Payload) -> Sequence[str]:
        found: Sequence[str] = self._own.chosen(_bare(state))
        return found


@dataclass(frozen=True)
class _Member:
    """A client whose base has the block beside it."""

    client: Client
    block: Params

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    @property
    def trainer(self) -> _Trainer:
        return _Trainer(self.client.trainer, self.block)


@dataclass(frozen=True)
class _Trainer:
    """A first-order trainer whose base has the block beside it."""

    trainer: Any
    block: Params

    def init(self, seed: int) -> Params:
        own: Params = self.trainer.init(seed)
        return own

    def fit(
        self,
        start: Params,
        *,
        frozen: Sequence[Params] = (),
        train: Callable[[str], bool] = lambda name: True,
        correct: Correct | None = None,
        strength: float = 1.0,
    ) -> Fit:
        beside = (self.block, *frozen)
        fit: Fit = self.trainer.fit(
            start, frozen=beside, train=train, correct=correct, strength=strength
        )
        return fit


def _bare(payload: Payload) -> Payload:
    return {group: own for group, own in payload.items() if group != GROUP}


def _kept(payload: Payload) -> Payload:
    return {GROUP: payload[GROUP]} if GROUP in payload else {}
