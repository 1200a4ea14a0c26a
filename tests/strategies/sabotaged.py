"""Strategies with one mistake each, as seen in real code; and correct ones of a user's own."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from corolla.aggregation.stacks import Stack
from corolla.aggregation.sums import ByGroup, SeedSums, WeightedMean
from corolla.client.training.worker import LocalClient
from corolla.directions.pools import SignPool
from corolla.interfaces import Client, ForwardTrainer, Observed
from corolla.strategies.fed_sb import FedSb
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedavgm import FedAvgM
from corolla.strategies.feddpa import FedDpa
from corolla.strategies.fedex_lora import FedExLora
from corolla.strategies.fedopt import FedAdam, FedYogi
from corolla.strategies.fedsa_lora import FedSaLora
from corolla.strategies.fedsvd import FedSvd
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.flexlora import FlexLora
from corolla.strategies.flora import Flora
from corolla.strategies.hetlora import HetLora
from corolla.strategies.lisa import Lisa
from corolla.strategies.lora_fair import LoraFair
from corolla.strategies.mixed import Mixed
from corolla.strategies.rolora import RoLora
from corolla.strategies.scalars.fedkseed import FedKSeed
from corolla.strategies.scalars.seed_pool import SeedPool
from corolla.tensors import factors, tree
from corolla.tensors.subsets import marked
from corolla.types import (
    Adapter,
    Aggregates,
    Broadcast,
    Cost,
    Fit,
    Metrics,
    Move,
    Params,
    Payload,
    Pool,
    Size,
    TrainerName,
    Update,
    Walk,
)


class ScalingForgotten(Flora):
    """Stacks B and A as they were trained, without alpha / r."""

    def local(self, client: Client, received: Payload) -> Update:
        update = super().local(client, received)
        raw = factors.bake(update.payload["factors"], 1 / client.lora.scaling)
        return Update({**update.payload, "factors": raw}, update.num_examples)


class ByWeightTwice(Stack):
    """p_m on A and on B: p_m² in the product."""

    def finalise(self) -> Payload:
        total = sum(weight for _, weight in self._parts)
        parts = [
            {name: tensor * (weight / total) for name, tensor in payload["factors"].items()}
            for payload, weight in self._parts
        ]
        return {"factors": factors.stack(parts)}


class WeightsOnBothFactors(Flora):
    def aggregator(self) -> ByGroup:
        return ByGroup({"factors": ByWeightTwice(), "head": WeightedMean()})


_LEFT_BEHIND: dict[frozenset[str], Params] = {}


class LeakingB(FfaLora):
    """Starts from the B that the client before has left in the process."""

    def local(self, client: Client, received: Payload) -> Update:
        b = factors.select(received["adapter"], factors.is_b)
        start = {**received["adapter"], **_LEFT_BEHIND.get(frozenset(b), b)}
        fit = client.trainer.fit({**received["A"], **start}, train=lambda n: not factors.is_a(n))
        _LEFT_BEHIND[frozenset(b)] = {name: fit.params[name] for name in b}
        trained = {name: fit.params[name] for name in start}
        update = tree.sub(trained, received["adapter"])
        return Update({"adapter": update}, fit.num_examples)


class TrainsA(FfaLora):
    """A is trained on the device and never sent."""

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        fit = client.trainer.fit({**received["A"], **start})
        trained = {name: fit.params[name] for name in start}
        return Update({"adapter": tree.sub(trained, start)}, fit.num_examples)


class PlainMean(WeightedMean):
    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, 1.0)


class Unweighted(FedAvg):
    def aggregator(self) -> WeightedMean:
        return PlainMean()


class UnweightedB(FfaLora):
    def aggregator(self) -> WeightedMean:
        return PlainMean()


class CountsClients(FedAvg):
    """Claims one example, whatever it was trained on: every weight becomes equal."""

    def local(self, client: Client, received: Payload) -> Update:
        update = super().local(client, received)
        return Update(update.payload, 1, update.metrics)


class DrawsFromGlobalState(Flora):
    """A fresh A from torch's global random state."""

    def local(self, client: Client, received: Payload) -> Update:
        seed = int(torch.randint(1 << 30, ()))
        return super().local(replace(cast(LocalClient, client), seed=seed), received)


class HeadForgotten(FedAvg):
    """The head travels, and is dropped."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        moved, metrics = super().apply(state, aggregate)
        head = factors.select(state["adapter"], factors.is_head)
        return {"adapter": {**moved["adapter"], **head}}, metrics


class HalfTheBytes(FfaLora):
    """Counts B as half of the adapter, which it is not with grouped queries."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [
            Cost(up=2 * (s.A + s.B) + 4 * s.head, down=4 * (s.B + s.head), once=4 * s.A)
            for s in cohort
        ]


class DownloadForgotten(Flora):
    """Counts a client's own factors as what it receives, not the whole stack."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=4 * n, down=4 * n) for n in (s.A + s.B + s.head for s in cohort)]


class SavesUntuned(FedAvg):
    def adapter(self, state: Payload) -> Adapter:
        b = factors.select(state["adapter"], factors.is_b)
        return Adapter({**state["adapter"], **tree.scale(b, 0.0)})


class KeepsTheLast(FedAvg):
    """An aggregator whose result depends on the order and the grouping."""

    def aggregator(self) -> WeightedMean:
        return LastOne()


class LastOne(WeightedMean):
    def add(self, payload: Payload, weight: float) -> None:
        self._sums, self._weight = {}, 0.0
        super().add(payload, weight)

    def merge(self, other: WeightedMean) -> None:
        pass


class ClaimsFactorsAreExact(FedAvg):
    aggregates: ClassVar[Aggregates] = "weights"


class MergesIntoHalf(FfaLora):
    """Keeps the global B in bfloat16."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        rounded = {name: t.bfloat16().float() for name, t in after["adapter"].items()}
        return {**after, "adapter": rounded}, metrics


class WrongKeys(FedAvg):
    """Sends what it does not announce: the server refuses every update."""

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"another": fresh}


class Raises(FedAvg):
    """Raises `error` in the server half."""

    error: ClassVar[type[Exception]] = ValueError

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        raise self.error("a mistake of its author")


class RaisesType(Raises):
    error = TypeError


class RaisesKey(Raises):
    error = KeyError


class RaisesIndex(Raises):
    error = IndexError


class RaisesZeroDivision(Raises):
    error = ZeroDivisionError


class RaisesAssertion(Raises):
    error = AssertionError


class RaisesOnDevice(FedAvg):
    def local(self, client: Client, received: Payload) -> Update:
        raise RuntimeError("a mistake of its author")


class NotFinite(FedAvg):
    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return {"adapter": tree.scale(state["adapter"], float("nan"))}, {}


# What is refined beyond a mean of factors, or kept on the devices.


class ResidualForgotten(FedExLora):
    """FedAvg by another name."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        own = aggregate["residual"]
        none = {n: t[:0] if factors.is_a(n) else t[:, :0] for n, t in own.items()}
        return super().apply(state, {**aggregate, "residual": none})


class ResidualScaledTwice(FedExLora):
    """Multiplies by alpha / r what is multiplied by it anyway."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return super().apply(
            state, {**aggregate, "residual": factors.bake(aggregate["residual"], 2.0)}
        )


class ResidualNotTrainedBeside(FedExLora):
    """The server adds residuals to the base, the clients do not."""

    def local(self, client: Client, received: Payload) -> Update:
        return super().local(client, {"adapter": received["adapter"]})


class SquareRootOnOneSide(FlexLora):
    """B = U √S, A = Vᵀ: the singular values come out as their roots."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        rooted = {
            n: t / t.norm(dim=0).clamp(min=1e-12).sqrt() if factors.is_b(n) else t
            for n, t in after["global"].items()
        }
        return {**after, "global": rooted}, metrics


class PenaltyNotRelative(LoraFair):
    """λ as it is, not relative to the size of Ā Āᵀ."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        a = tree.add(state["adapter"], aggregate["adapter"])[_first_a(state["adapter"])]
        penalty = self.penalty / float((a @ a.T).diagonal().mean())
        return LoraFair(penalty).apply(state, aggregate)


def _first_a(params: Params) -> str:
    return min(name for name in params if factors.is_a(name))


class PhaseStuck(RoLora):
    """Never turns to A; the server, which counts rounds, refuses what comes."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        return {**after, "phase": state["phase"]}, metrics


class FrozenHalfNotRestored(RoLora):
    """Trains A beside the B that the client before has left in the process."""

    def local(self, client: Client, received: Payload) -> Update:
        key = frozenset(received["B"])
        if received["phase"]["trains_a"]:
            return super().local(client, {**received, "B": _LEFT_BEHIND[key]})
        update = super().local(client, received)
        moved = update.payload["adapter"]
        _LEFT_BEHIND[key] = {n: t + moved[n] for n, t in received["B"].items()}
        return update


class SingularValuesForgotten(FedSvd):
    """B = U."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        unit = {
            n: t / t.norm(dim=0).clamp(min=1e-12) if factors.is_b(n) else t
            for n, t in after["adapter"].items()
        }
        return {**after, "adapter": unit}, metrics


class CoresBySize(FedSb):
    """Weighs every client alike."""

    def aggregator(self) -> WeightedMean:
        return PlainMean()


class PaddedMean(WeightedMean):
    def add(self, payload: Payload, weight: float) -> None:
        super().add({"factors": factors.pad(payload["factors"], 16)}, weight)


class NormsForgotten(HetLora):
    """Weighs padded factors by examples."""

    def aggregator(self) -> ByGroup:
        return ByGroup({"factors": PaddedMean(), "head": WeightedMean()})


class MomentumForgotten(FedAvgM):
    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        return {**after, "momentum": state["momentum"]}, metrics


class BetasConfused(FedAdam):
    """β₁ in the place of β₂."""

    def _variance(self, v: Tensor, delta: Tensor) -> Tensor:
        return self.beta1 * v + (1 - self.beta1) * delta.square()


class SignForgotten(FedYogi):
    """A variance that only falls."""

    def _variance(self, v: Tensor, delta: Tensor) -> Tensor:
        return (v - (1 - self.beta2) * delta.square()).clamp(min=self.tau**2 / 2)


class AveragesB(FedSaLora):
    """Sends B as well, and everybody goes on from its mean."""

    def init(self, start: Params, seed: int) -> Payload:
        return {"adapter": factors.select(start, factors.is_a, factors.is_b)}

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": factors.select(fresh, factors.is_a, factors.is_b)}


class SendsLocal(FedDpa):
    """The wrong one of the two adapters leaves the device."""

    def local(self, client: Client, received: Payload) -> Update:
        update = super().local(client, received)
        start, own = received["adapter"], update.keep["personal"]
        moved = {n: own[n] - start[n] if n in own else t for n, t in _adapter(update).items()}
        return replace(update, payload={"adapter": moved})


class SendsBoth(FedDpa):
    """The local adapter beside the global one."""

    def local(self, client: Client, received: Payload) -> Update:
        update = super().local(client, received)
        return replace(update, payload={**update.payload, "local": update.keep["personal"]})

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"adapter": fresh, "local": factors.select(fresh, factors.is_a, factors.is_b)}


def _adapter(update: Update) -> Params:
    return update.payload["adapter"]


# Zeroth order: what travels are scalars, and both sides must make the same step of them.


class ExamplesForgotten(SeedSums):
    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, 1.0)


class UnweightedScalars(SeedPool):
    def aggregator(self) -> SeedSums:
        return ExamplesForgotten(self.size)


class SumOfClients(SeedSums):
    """Adds up where it should average: a learning rate times the number of clients."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.clients = 0

    def add(self, payload: Payload, weight: float) -> None:
        super().add(payload, weight)
        self.clients += 1

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.clients += other.clients

    def finalise(self) -> Payload:
        return {"scalars": tree.scale(super().finalise()["scalars"], float(self.clients))}


class AddsUpClients(SeedPool):
    def aggregator(self) -> SeedSums:
        return SumOfClients(self.size)


@dataclass(frozen=True)
class EarlierSigns:
    """A trainer that takes the signs of the round before, whatever it is asked for."""

    own: ForwardTrainer

    @property
    def queries(self) -> int:
        return self.own.queries

    def walk(
        self,
        start: Params,
        moves: Sequence[Move],
        pool: Pool,
        directions: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Walk:
        seed, round = cast(SignPool, pool).key
        earlier = SignPool(cast(SignPool, pool).size, (seed, round - 1))
        return self.own.walk(start, moves, earlier, directions, dtype)


class _Behind(LocalClient):
    @property
    def forward(self) -> ForwardTrainer:  # type: ignore[override]
        return EarlierSigns(super().forward)


class SignsOfTheRoundBefore(SeedPool):
    """Client and server disagree by one on the number of the round."""

    def local(self, client: Client, received: Payload) -> Update:
        own = cast(LocalClient, client)
        return super().local(
            _Behind(**{f.name: getattr(own, f.name) for f in fields(own)}), received
        )


class StepOfOne(SeedSums):
    def add(self, payload: Payload, weight: float) -> None:
        scalars = {**payload["scalars"], "step": torch.tensor(1.0)}
        super().add({"scalars": scalars}, weight)


class StepForgotten(SeedPool):
    def aggregator(self) -> SeedSums:
        return StepOfOne(self.size)


class StepForgottenInSums(FedKSeed):
    def aggregator(self) -> SeedSums:
        return StepOfOne(self.size)


class Uphill(SeedPool):
    """The server moves against the step of its clients."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return super().apply(state, {"scalars": tree.scale(aggregate["scalars"], -1.0)})


class OtherSeed(SeedSums):
    def add(self, payload: Payload, weight: float) -> None:
        scalars = {**payload["scalars"], "seed": payload["scalars"]["seed"] + 1}
        super().add({"scalars": scalars}, weight)


class ReplaysAnotherSeed(SeedPool):
    def aggregator(self) -> SeedSums:
        return OtherSeed(self.size)


class FirstOne(SeedSums):
    def add(self, payload: Payload, weight: float) -> None:
        if not self._weight:
            super().add(payload, weight)

    def merge(self, other: SeedSums) -> None:
        pass


class CountsTheFirstClient(SeedPool):
    def aggregator(self) -> SeedSums:
        return FirstOne(self.size)


class RowsOfWholeNumbers(SeedPool):
    """A row in 8 bits: 127 steps for its largest scalar."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        sums = aggregate["scalars"]["scalars"]
        unit = sums.abs().max() / 127
        return super().apply(state, {"scalars": {"scalars": (sums / unit).round() * unit}})


class KeepsTheLastRow(SeedPool):
    """A model that forgets all rounds but one."""

    def adapter(self, state: Payload) -> Adapter:
        whole = super().adapter(state)
        return Adapter(whole.trained, moves=whole.moves[-1:])


class DirectionsFromGlobalState(FedKSeed):
    """Says honestly which directions it took, but takes others each time."""

    def local(self, client: Client, received: Payload) -> Update:
        seed = int(torch.randint(1 << 30, ()))
        return super().local(replace(cast(LocalClient, client), seed=seed), received)


class SeedOfItsChoice(SeedPool):
    """Takes another seed than the client was given: the server refuses every update."""

    def local(self, client: Client, received: Payload) -> Update:
        own = replace(cast(LocalClient, client), seed=client.seed ^ 1)
        return super().local(own, received)


class RateOfItsChoice(SeedPool):
    """Learns twice as fast as it was told."""

    def local(self, client: Client, received: Payload) -> Update:
        own = cast(LocalClient, client)
        faster = own.config.model_copy(update={"lr": 2 * own.config.lr})
        return super().local(replace(own, config=faster), received)


class HeaderForgotten(SeedPool):
    """A formula that forgets the seed and the step of each client."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [replace(cost, up=cost.up - 8) for cost in super().cost(cohort)]


class SmallRows(SeedPool):
    """Claims a download of one value a row."""

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [replace(cost, down=2 + 4) for cost in super().cost(cohort)]


class ClassesAlike(Mixed):
    """Each class counts for one half, however many examples it has."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        examples = (aggregate["counts"]["examples"] > 0).double()
        counts = {**aggregate["counts"], "examples": examples}
        return super().apply(state, {**aggregate, "counts": counts})


@dataclass(frozen=True)
class Own:
    """A user's own strategy, correct, from nothing but the protocol: all travels, B is trained."""

    name: ClassVar[str] = "own"
    aggregates: ClassVar[Aggregates] = "weights"
    mixed_ranks: ClassVar[bool] = False
    trainers: ClassVar[tuple[TrainerName, ...]] = ("first_order",)
    full: ClassVar[bool] = False

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if self.server_lr <= 0:
            raise ValueError(f"server_lr must be positive, found {self.server_lr}")

    def init(self, start: Params, seed: int) -> Payload:
        return {"all": start}

    def broadcast(self, state: Payload) -> Broadcast:
        return Broadcast(state)

    def local(self, client: Client, received: Payload) -> Update:
        start = received["all"]
        fit = client.trainer.fit(start, train=lambda n: not factors.is_a(n))
        moved = {n: fit.params[n] - start[n] for n in start if not factors.is_a(n)}
        return Update({"moved": moved}, fit.num_examples, fit.metrics)

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {"moved": {n: t for n, t in fresh.items() if not factors.is_a(n)}}

    def aggregator(self) -> WeightedMean:
        return WeightedMean()

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        step = tree.scale(aggregate["moved"], self.server_lr)
        moved = {n: t + step[n] if n in step else t for n, t in state["all"].items()}
        return {"all": moved}, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state["all"])

    @property
    def exact(self) -> bool:
        return self.server_lr == 1

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Part of the way from where the round began to the mean of what clients trained."""
        last = rounds[-1]
        mean = factors.mean(last.trained, last.weights)
        return {n: t + self.server_lr * (mean[n] - t) for n, t in last.start.items()}

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(4 * (s.B + s.head), 4 * (s.A + s.B + s.head)) for s in cohort]


class NoStrategy:
    """Has a name and nothing else."""

    name = "none"


NOT_A_CLASS = FedAvg()


@dataclass(frozen=True)
class _OneBlock(Lisa):
    """The models of the check have two blocks, which lisa would train together."""

    layers: int = 1


class ForgetsWhatWasTrained(_OneBlock):
    """Sends the blocks of the last round alone, also to clients that have missed others."""

    def broadcast(self, state: Payload) -> Broadcast:
        sent = super().broadcast(state)
        last = marked({unit for unit in state if unit != "subset"}, state["subset"]["last"])
        return Broadcast(sent.payload, {unit: sent.cached[unit] for unit in last})


class ShrinksWhatIsFrozen(_OneBlock):
    """Weight decay of the server reaches tensors that nobody has trained."""

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        after, metrics = super().apply(state, aggregate)
        moved = aggregate["adapter"]
        shrunk = {
            unit: {n: t if n in moved or unit == "subset" else 0.99 * t for n, t in own.items()}
            for unit, own in after.items()
        }
        return shrunk, metrics


class TrainsEverything(_OneBlock):
    """Sends the subset, with what all other tensors did to it while they were trained too."""

    def local(self, client: Client, received: Payload) -> Update:
        return super().local(cast(Client, _All(client)), received)


@dataclass
class _All:
    """A client whose trainer trains all that it is given."""

    client: Client

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)

    @property
    def trainer(self) -> "_All":
        return self

    def init(self, seed: int) -> Params:
        return self.client.trainer.init(seed)

    def fit(self, start: Params, **_: object) -> Fit:
        return self.client.trainer.fit(start)
