"""Aggregators: monoids that fold the updates of a round. Sums run in fp64 and are rounded once.

The linear ones can travel (see corolla.interfaces.Summable): what a gateway has summed, a server
absorbs as if it had folded in the updates itself, up to the order of additions in fp64.
"""

from collections.abc import Mapping
from typing import Self, TypeGuard

import torch
from torch import Tensor

from corolla.directions import seedlog
from corolla.interfaces import Aggregator, Summable
from corolla.types import Params, Payload

_SUM = "sum."
"""Before the name of a tensor that is a sum: one called "scalars" would travel as scalars do."""


def summable(aggregator: Aggregator) -> Summable | None:
    """The aggregator where its content can travel as sums, else None."""
    return aggregator if _is_summable(aggregator) else None


def _is_summable(aggregator: Aggregator) -> TypeGuard[Summable]:
    if isinstance(aggregator, ByGroup):
        return all(_is_summable(own) for own in aggregator.groups.values())
    return aggregator.linear and isinstance(aggregator, Summable)


def summed(sums: Payload) -> Payload:
    """Sums as they travel: each tensor by a name that says it is one."""
    return {group: {_SUM + name: t for name, t in own.items()} for group, own in sums.items()}


def summed_like(like: Payload) -> Payload:
    """The form of `summed` of tensors of this form."""
    return summed({group: {n: t.double() for n, t in own.items()} for group, own in like.items()})


def terms(sums: Payload) -> Payload:
    """Returns the sums that `summed` was made of, by their own names."""
    return {
        group: {name.removeprefix(_SUM): tensor for name, tensor in own.items()}
        for group, own in sums.items()
    }


class WeightedMean:
    """Σ w_m x_m / Σ w_m of every tensor of every group, in O(1) clients of memory."""

    linear = True

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._dtypes: dict[tuple[str, str], torch.dtype] = {}
        self._weight = 0.0

    def add(self, payload: Payload, weight: float) -> None:
        for group, params in payload.items():
            self._sums.setdefault(group, {})  # a group may be empty: a model without a head
            for name, tensor in params.items():
                self._dtypes[group, name] = tensor.dtype
                self._accumulate(group, name, tensor.double() * weight)
        self._weight += weight

    def merge(self, other: Self) -> None:
        self._fold(other._sums, other._weight)
        self._dtypes.update(other._dtypes)

    def sums(self) -> Payload:
        return summed(self._sums)

    def sums_like(self, like: Payload) -> Payload:
        return summed_like(like)

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        self._fold(terms(sums), weight)
        self._dtypes.update({(g, n): t.dtype for g, own in like.items() for n, t in own.items()})

    def finalise(self) -> Payload:
        if not self._weight > 0:
            raise ValueError("nothing to average: the weights sum to 0")
        return {
            group: {n: (t / self._weight).to(self._dtypes[group, n]) for n, t in params.items()}
            for group, params in self._sums.items()
        }

    def _fold(self, sums: Payload, weight: float) -> None:
        for group, params in sums.items():
            self._sums.setdefault(group, {})
            for name, tensor in params.items():
                self._accumulate(group, name, tensor)
        self._weight += weight

    def _accumulate(self, group: str, name: str, value: Tensor) -> None:
        sums = self._sums[group]
        sums[name] = sums[name] + value if name in sums else value


class Sum(WeightedMean):
    """Σ x_m of every tensor, in fp64: weights do not count."""

    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, 1.0)

    def finalise(self) -> Payload:
        if not self._sums:
            raise ValueError("nothing to sum: no client")
        return {
            group: {n: t.to(self._dtypes[group, n]) for n, t in params.items()}
            for group, params in self._sums.items()
        }

    def _accumulate(self, group: str, name: str, value: Tensor) -> None:
        sums = self._sums[group]
        sums[name] = sums.get(name, 0) + value  # from 0, so that no -0.0 is left of one client


class SeedSums:
    """Σ_m p_m step_m Σ_t g_mt e_{k_mt}: what clients measured along directions, K sums in fp64.

    Folds the group "scalars" of an update: scalars g (T,), the step they were multiplied by, and
    their directions k or the seed that these follow from. p_m = w_m / Σ w.
    """

    linear = True

    def __init__(self, size: int) -> None:
        self._sums = torch.zeros(size, dtype=torch.float64)
        self._weight = 0.0

    def add(self, payload: Payload, weight: float) -> None:
        scalars = payload["scalars"]
        values = scalars["scalars"].double() * (weight * float(scalars["step"]))
        self._sums.index_add_(0, seedlog.directions(scalars, len(self._sums)), values)
        self._weight += weight

    def merge(self, other: Self) -> None:
        self._sums += other._sums
        self._weight += other._weight

    def sums(self) -> Payload:
        return summed({"scalars": {"directions": self._sums}})

    def sums_like(self, like: Payload) -> Payload:
        return summed_like({"scalars": {"directions": self._sums}})

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        self._sums += terms(sums)["scalars"]["directions"]
        self._weight += weight

    def finalise(self) -> Payload:
        if not self._weight > 0:
            raise ValueError("nothing to sum: the weights sum to 0")
        return {"scalars": {"scalars": self._sums / self._weight}}


class ByGroup:
    """A different aggregator for each group of a payload."""

    def __init__(self, groups: Mapping[str, Aggregator]) -> None:
        self.groups = dict(groups)
        self.linear = all(aggregator.linear for aggregator in self.groups.values())

    def add(self, payload: Payload, weight: float) -> None:
        for group, aggregator in self.groups.items():
            aggregator.add({group: payload[group]}, weight)

    def merge(self, other: Self) -> None:
        for group, aggregator in self.groups.items():
            aggregator.merge(other.groups[group])

    def sums(self) -> Payload:
        merged: dict[str, Params] = {}
        for aggregator in self._summable().values():
            merged |= aggregator.sums()
        return merged

    def sums_like(self, like: Payload) -> Payload:
        merged: dict[str, Params] = {}
        for group, aggregator in self._summable().items():
            merged |= aggregator.sums_like({group: like[group]})
        return merged

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        for group, aggregator in self._summable().items():
            own = aggregator.sums_like({group: like[group]})
            aggregator.absorb({g: sums[g] for g in own}, weight, {group: like[group]})

    def finalise(self) -> Payload:
        merged: dict[str, Params] = {}
        for aggregator in self.groups.values():
            merged |= aggregator.finalise()
        return merged

    def _summable(self) -> Mapping[str, Summable]:
        """All of them. Raises ValueError unless each can travel as sums."""
        able = {group: own for group, own in self.groups.items() if _is_summable(own)}
        if able.keys() != self.groups.keys():
            raise ValueError(f"not sums: {sorted(self.groups.keys() - able.keys())}")
        return able
