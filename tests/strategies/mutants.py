"""Strategies with one mistake each in how clients are put together, weighted and remembered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from corolla.aggregation.sums import ByGroup, Sum, WeightedMean
from corolla.aggregation.two_classes import TwoMeans
from corolla.client.training.worker import LocalClient
from corolla.interfaces import Client, Observed
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedavgm import FedAvgM
from corolla.strategies.fedex_lora import FedExLora
from corolla.strategies.fedopt import FedAdam
from corolla.strategies.fedprox import FedProx
from corolla.strategies.fedsa_lora import FedSaLora
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.fisher import FisherMerge
from corolla.strategies.flexlora import FlexLora
from corolla.strategies.flora import Flora
from corolla.strategies.listing.options import option
from corolla.strategies.mixed import Mixed
from corolla.strategies.scaffold import Scaffold
from corolla.strategies.scalars.fedkseed import FedKSeed
from corolla.strategies.scalars.seed_pool import SeedPool
from corolla.tensors import blocks, factors, tree
from corolla.types import Aggregates, Cost, Metrics, Params, Payload, Size, Update

# Aggregators of one's own: all updates are kept until the end.


class Keeper:
    """Keeps what is folded in, in the order in which it came; what is made of it is `mean`."""

    linear = False

    def __init__(self) -> None:
        self.parts: list[tuple[Payload, float]] = []

    def add(self, payload: Payload, weight: float) -> None:
        self.parts.append((payload, weight))

    def merge(self, other: Self) -> None:
        self.parts.extend(other.parts)

    def finalise(self) -> Payload:
        return self.mean(self.parts)

    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        total = sum(w for _, w in parts)
        return combined(parts, [w / total for _, w in parts])


def combined(parts: Sequence[tuple[Payload, float]], shares: Sequence[float]) -> Payload:
    first, _ = parts[0]
    pairs = list(zip(shares, (payload for payload, _ in parts), strict=True))
    return {
        g: {n: torch.stack([s * p[g][n].double() for s, p in pairs]).sum(0).float() for n in own}
        for g, own in first.items()
    }


class _Groups(Keeper):
    """The median over three groups' means, which are formed in the order of arrival."""

    weighted = False

    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        groups = [parts[i::3] for i in range(3) if parts[i::3]]
        means = [self.of_group(group) for group in groups]
        first = means[0]
        return {
            g: {n: torch.stack([m[g][n] for m in means]).median(0).values for n in own}
            for g, own in first.items()
        }

    def of_group(self, group: Sequence[tuple[Payload, float]]) -> Payload:
        if self.weighted:
            return super().mean(group)
        return combined(group, [1 / len(group)] * len(group))


class _WeightedGroups(_Groups):
    weighted = True


@dataclass(frozen=True)
class MedianOfMeans(FedAvg):
    """Ignores the weights that its `expected` goes by."""

    aggregates: ClassVar[Aggregates] = "other"

    def aggregator(self) -> Keeper:
        return _Groups()

    def expected(self, rounds: Sequence[Observed]) -> Params:
        last = rounds[-1]
        parts = [
            ({"adapter": tree.sub(own, last.start)}, last.weights[client])
            for client, own in last.trained.items()
        ]
        move = _WeightedGroups().mean(parts)["adapter"]
        return {n: last.start[n].double() + move[n] for n in move}


@dataclass(frozen=True)
class ByArrival(MedianOfMeans):
    """Weighs as it says it does, but its groups are those of arrival."""

    def aggregator(self) -> Keeper:
        return _WeightedGroups()


class _ByHalves(Keeper):
    """The mean of the first half alone."""

    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        return super().mean(parts[: len(parts) // 2 + len(parts) % 2])


class FirstHalf(FedAvg):
    """Two of six clients swapped, and it is another model."""

    def aggregator(self) -> Keeper:
        return _ByHalves()


class _ByPosition(Keeper):
    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        weights = [w * (1 + i) for i, (_, w) in enumerate(parts)]
        return combined(parts, [w / sum(weights) for w in weights])


class WeightsByPosition(FedAvg):
    def aggregator(self) -> Keeper:
        return _ByPosition()


class _Even(Keeper):
    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        return super().mean(parts[:-1] if len(parts) % 2 and len(parts) > 3 else parts)


class LastOfOddDropped(FedAvg):
    """Right for cohorts of four and six."""

    def aggregator(self) -> Keeper:
        return _Even()


class _Window(Keeper):
    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        return super().mean(parts[-32:])


class LastThirtyTwo(FedAvg):
    """A buffer of 32 updates."""

    def aggregator(self) -> Keeper:
        return _Window()


class _Median(Keeper):
    linear = True

    def mean(self, parts: Sequence[tuple[Payload, float]]) -> Payload:
        return combined([self._of(parts)], [1.0])

    def _of(self, parts: Sequence[tuple[Payload, float]]) -> tuple[Payload, float]:
        first, _ = parts[0]
        stacks = {g: {n: torch.stack([p[g][n] for p, _ in parts]) for n in o}
                  for g, o in first.items()}  # fmt: skip
        return {g: {n: t.median(0).values for n, t in own.items()} for g, own in stacks.items()}, 1


@dataclass(frozen=True)
class ClaimsLinear(FedAvg):
    """A median of coordinates, right by its own word, that says a sum would do."""

    aggregates: ClassVar[Aggregates] = "other"
    weighted: ClassVar[bool] = False

    def aggregator(self) -> Keeper:
        return _Median()

    def expected(self, rounds: Sequence[Observed]) -> Params:
        last = rounds[-1]
        moved = {
            n: torch.stack([(own[n] - last.start[n]).double() for own in last.trained.values()])
            for n in last.start
        }
        return {n: last.start[n].double() + t.median(0).values for n, t in moved.items()}


class SaysNothingOfWeights(ClaimsLinear):
    """The same, honest about sums, that leaves out that examples do not count."""

    weighted: ClassVar[bool] = True

    def aggregator(self) -> Keeper:
        found = _Median()
        found.linear = False
        return found


# Sums.


class _Halved(WeightedMean):
    """Merging is the mean of two means, whatever they weigh."""

    def merge(self, other: Self) -> None:
        if not other._weight or not self._weight:
            super().merge(other)
            return
        own, theirs = super().finalise(), WeightedMean.finalise(other)
        total = self._weight + other._weight
        self._sums, self._weight = {}, 0.0
        for part in (own, theirs):
            super().add(part, total / 2)


class MeanOfMeans(FfaLora):
    def aggregator(self) -> WeightedMean:
        return _Halved()


class _Twice(WeightedMean):
    """A sum that is merged into another one is added once more where it has several clients."""

    def __init__(self) -> None:
        super().__init__()
        self.clients = 0

    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, weight)
        self.clients += 1

    def merge(self, other: Self) -> None:
        super().merge(other)
        if other.clients > 1:
            super().merge(other)
        self.clients += other.clients


class CountedTwice(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Twice()


class _Running(WeightedMean):
    """m ← (m + x) / 2, up to weights: who comes last counts most."""

    def add(self, payload: Payload, weight: float) -> None:
        self._sums = {g: {n: t / 2 for n, t in own.items()} for g, own in self._sums.items()}
        self._weight /= 2
        super().add(payload, weight)


class RunningMean(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Running()


class _Changed(WeightedMean):
    """Weighs by something else than examples."""

    power, most, whole = 1.0, float("inf"), False

    def add(self, payload: Payload, weight: float) -> None:
        changed = min(weight, self.most) ** self.power
        super().add(payload, float(int(changed)) if self.whole else changed)


class _Squared(_Changed):
    power = 2.0


class _Root(_Changed):
    power = 0.5


class _Clamped(_Changed):
    most = 1000.0


class _Whole(_Changed):
    whole = True


class WeightsSquared(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Squared()


class WeightsRooted(FfaLora):
    def aggregator(self) -> WeightedMean:
        return _Root()


class WeightsClamped(FedAvg):
    """Right for every client of fewer than a thousand examples."""

    def aggregator(self) -> WeightedMean:
        return _Clamped()


class WholeWeights(FedAvg):
    """Right until a late update counts for less."""

    def aggregator(self) -> WeightedMean:
        return _Whole()


class _Half(WeightedMean):
    def _accumulate(self, group: str, name: str, value: Tensor) -> None:
        super()._accumulate(group, name, value)
        self._sums[group][name] = self._sums[group][name].half().double()


class SumsInHalf(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Half()


class _NoZeros(WeightedMean):
    """Leaves out who has nothing to say."""

    def add(self, payload: Payload, weight: float) -> None:
        if any(bool(t.any()) for own in payload.values() for t in own.values()):
            super().add(payload, weight)


class StillClientsForgotten(FedAvg):
    """A client whose update is zero weighs nothing."""

    def aggregator(self) -> WeightedMean:
        return _NoZeros()


_SHARED: dict[str, dict[str, Tensor]] = {}


class _Common(WeightedMean):
    """Sums in a dictionary of the class: two aggregators at a time are one."""

    def __init__(self) -> None:
        super().__init__()
        _SHARED.clear()
        self._sums = _SHARED


class OneDictionaryForAll(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Common()


class _Weightless(WeightedMean):
    """Absorbs sums and forgets what they weigh."""

    def absorb(self, sums: Payload, weight: float, like: Payload) -> None:
        super().absorb(sums, min(weight, 1.0), like)


class GatewaysOfOneExample(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Weightless()


class _OneClass(TwoMeans):
    """Merges the first-order half alone where the other one has sums, too."""

    def merge(self, other: Self) -> None:
        mine = self._sums.clone()
        super().merge(other)
        if bool(mine.any()):
            self._sums = mine


class ScalarsLostInMerge(Mixed):
    def aggregator(self) -> TwoMeans:
        return _OneClass(self.size)


# The server half.


class MomentumOfAnother(FedAvgM):
    """Each tensor takes the momentum of the one before it of the same shape."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        names: dict[torch.Size, list[str]] = {}
        for name in sorted(state["momentum"]):
            names.setdefault(state["momentum"][name].shape, []).append(name)
        other = {n: own[i - 1] for own in names.values() for i, n in enumerate(own)}
        momentum = {n: state["momentum"][other[n]] for n in state["momentum"]}
        return super().apply({**state, "momentum": momentum}, aggregate)


class RateIgnored(FedAvgM):
    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return FedAvgM(self.beta, 1.0).apply(state, aggregate)


class PullIgnored(FedProx):
    """Trains without the proximal term, whatever mu is."""

    def local(self, client: Client, received: Payload) -> Update:
        return FedProx(0.0).local(client, received)


class FloorIgnored(FedAdam):
    """tau is always 1e-3 in the step, and is itself in the start of v."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return FedAdam(self.lr, self.beta1, self.beta2).apply(state, aggregate)


class CutTooFar(FedExLora):
    """residual_rank = k keeps k - 1."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        rank = self.residual_rank
        own = self if rank is None else replace(self, residual_rank=max(1, rank - 1))
        return FedExLora.apply(own, state, aggregate)


class EnergyOfValues(Flora):
    """Keeps a part of the singular values, not of their squares."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return Flora.apply(replace(self, energy=self.energy**0.5), state, aggregate)


class CutsTheNewest(Flora):
    """Cuts the factors that came last instead of the smallest singular values."""

    def cut(self, state: Payload, rank: int) -> tuple[Payload, Metrics]:
        whole = factors.stack([*blocks.of(state).values()])
        first = {n: t[:rank] if factors.is_a(n) else t[:, :rank] for n, t in whole.items()}
        return {"head": state["head"], blocks.COMPACTED: first}, {"rank_error": 0.0}


class LeavesOutWhatCounts(FlexLora):
    """A block that a client does not train is missing in its factors, and counts as zero."""

    partial: ClassVar[str] = "absent"


class StartUnbalanced(FlexLora):
    """The balanced start forgets one root of the scaling."""

    def _split(self, whole: Params, lora):  # type: ignore[no-untyped-def]
        start = super()._split(whole, lora)
        return factors.bake(start, lora.scaling**0.5) if self.balanced else start


_MEMORY: dict[frozenset[str], Params] = {}


class HiddenMomentum(FedAvg):
    """Half of the last step again, from a variable of the process instead of the state."""

    aggregates: ClassVar[Aggregates] = "other"

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        key, move = frozenset(state["adapter"]), aggregate["adapter"]
        last = _MEMORY.get(key, tree.scale(move, 0.0))
        _MEMORY[key] = move
        after = tree.add(state["adapter"], tree.add(move, tree.scale(last, 0.5)))
        return {"adapter": after}, {}


class ChangesItsState(FfaLora):
    """Adds in place."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        for name, tensor in state["adapter"].items():
            tensor += aggregate["adapter"][name]
        return dict(state), {}


class SaysLittle(FedAvgM):
    """`expected` leaves out all but one module."""

    def expected(self, rounds: Sequence[Observed]) -> Params:
        whole = super().expected(rounds)
        one = factors.modules(whole)[0]
        return {n: t for n, t in whole.items() if n.startswith(one + ".")}


class GenerousFormula(SeedPool):
    """A bound that says nothing."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [replace(cost, up=1 << 20) for cost in super().cost(cohort)]


# Devices.


_FIRST: dict[frozenset[str], Params] = {}


class FirstFactorReused(FfaLora):
    """Every client starts from the B that the first one of all has trained."""

    def local(self, client: Client, received: Payload) -> Update:
        given = received["adapter"]
        b = factors.select(given, factors.is_b)
        start = {**given, **_FIRST.get(frozenset(b), b)}
        fit = client.trainer.fit({**received["A"], **start}, train=lambda n: not factors.is_a(n))
        trained = {name: fit.params[name] for name in given}
        _FIRST.setdefault(frozenset(b), {name: fit.params[name] for name in b})
        return Update({"adapter": tree.sub(trained, given)}, fit.num_examples)


class ControlAveraged(Scaffold):
    """c is the mean over the cohort of what is to be summed."""

    def aggregator(self) -> ByGroup:
        return ByGroup({"adapter": WeightedMean(), "control": WeightedMean()})


class ControlByExamples(Scaffold):
    """c sums what clients learnt times their examples."""

    def aggregator(self) -> ByGroup:
        return ByGroup({"adapter": WeightedMean(), "control": _SumByExamples()})


class _SumByExamples(Sum):
    def add(self, payload: Payload, weight: float) -> None:
        WeightedMean.add(self, {g: tree.scale(p, weight / 8) for g, p in payload.items()}, 1.0)


class OwnFactorForgotten(FedSaLora):
    """B starts from zero in every round."""

    def local(self, client: Client, received: Payload) -> Update:
        return super().local(replace(cast(LocalClient, client), kept={}), received)


class SameDirections(FedKSeed):
    """The seed of the first client, for every client and round."""

    def local(self, client: Client, received: Payload) -> Update:
        return super().local(replace(cast(LocalClient, client), seed=7), received)


@dataclass(frozen=True)
class WithoutValues(FedAvg):
    """An option that only knows its default."""

    only: str = option("mean", "How updates are put together.", "median")

    def __post_init__(self) -> None:
        if self.only != "mean":
            raise ValueError(f"only must be mean, found {self.only}")


# What passed at first when somebody tried to get past the check.


class LateSign(FfaLora):
    """From its fourth round on it moves against its clients."""

    def init(self, start: Params, seed: int) -> Payload:
        return {**super().init(start, seed), "count": {"rounds": torch.tensor(0)}}

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        number = state["count"]["rounds"] + 1
        sign = -1.0 if number > 3 else 1.0
        move = tree.scale(aggregate["adapter"], sign)
        after = {**state, "adapter": tree.add(state["adapter"], move)}
        return {**after, "count": {"rounds": number}}, {}


class FisherUnweighted(FisherMerge):
    """The denominator is the mean over clients, not over their examples."""

    def aggregator(self) -> ByGroup:
        return ByGroup({"weighted": WeightedMean(), "fisher": _Unweighted()})


class _Unweighted(WeightedMean):
    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, 1.0)


class FisherOfTheMean(FisherMerge):
    """The mean of F Δ over the mean of F of all coordinates: a FedAvg of its own weights."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        fisher = aggregate["fisher"]
        flat = {n: torch.full_like(f, float(f.mean())) for n, f in fisher.items()}
        return super().apply(state, {**aggregate, "fisher": flat})


class FisherFloorTooHigh(FisherMerge):
    """A floor of a hundredth of the mean holds back what few depend on."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        fisher = {n: f + 0.01 * f.mean() for n, f in aggregate["fisher"].items()}
        return super().apply(state, {**aggregate, "fisher": fisher})


class StartsFromSmallB(FedAvg):
    """Clients of it cut large values of B, which no start at zero has."""

    def local(self, client: Client, received: Payload) -> Update:
        own = received["adapter"]
        cut = {n: t.clamp(-0.3, 0.3) if factors.is_b(n) else t for n, t in own.items()}
        return super().local(client, {**received, "adapter": cut})


class SaysItRounds(FedAvg):
    """Whatever it gets wrong, it calls rounding."""

    rounding: ClassVar[float] = 10.0

    def aggregator(self) -> WeightedMean:
        return _Squared()


class EvaluatesItsStart(FfaLora):
    """Clients evaluate the base model: a received broadcast is not a state."""

    def adapter(self, state: Payload):  # type: ignore[no-untyped-def]
        whole = super().adapter(state)
        if "here" in state:
            return whole
        b = factors.select(whole.trained, factors.is_b)
        return replace(whole, trained={**whole.trained, **tree.scale(b, 0.0)})

    def init(self, start: Params, seed: int) -> Payload:
        return {**super().init(start, seed), "here": {"here": torch.tensor(1)}}

    def broadcast(self, state: Payload):  # type: ignore[no-untyped-def]
        return super().broadcast({g: own for g, own in state.items() if g != "here"})


class OnceForgotten(FfaLora):
    """A travels to every client, and is in no formula."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [replace(cost, once=0) for cost in super().cost(cohort)]


class GenerousDownload(SeedPool):
    """A bound on what is received that says nothing."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [replace(cost, down=1 << 20) for cost in super().cost(cohort)]


class _Whole32(WeightedMean):
    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, weight)
        own = torch.tensor(int(self._weight)).to(torch.int32)
        self._weight = float(own) if weight == int(weight) else self._weight


class CountsIn32Bits(FedAvg):
    def aggregator(self) -> WeightedMean:
        return _Whole32()


class _ByWeight(Keeper):
    """Updates in a dictionary whose keys are their weights."""

    def add(self, payload: Payload, weight: float) -> None:
        self.parts = [*((p, w) for p, w in self.parts if w != weight), (payload, weight)]


class SameWeightReplaced(FedAvg):
    """Right as long as no two clients have as many examples."""

    def aggregator(self) -> Keeper:
        return _ByWeight()
