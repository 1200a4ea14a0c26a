"""`corolla plan`: what a run will cost, before anything is loaded: bytes, memory, time, privacy.

Reads the data, the tokenizer, config.json and the headers of the model's files; never its weights.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from corolla.budgets import settle
from corolla.client.device.machine import Choice, choose
from corolla.commands.plan import lengths, secure, subsets
from corolla.commands.plan.lengths import Batches
from corolla.commands.plan.secure import SecureCost
from corolla.commands.plan.throughput import throughput
from corolla.config import schedule
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data import census, federated
from corolla.data.encoding import Encoder
from corolla.data.federated import FederatedData
from corolla.data.rows import counted
from corolla.errors import ConfigError
from corolla.estimates import classifier_sizes, footprint
from corolla.estimates.footprint import Estimate, Workload
from corolla.evaluation.labels import ordered
from corolla.interfaces import Choosing, Stacking
from corolla.models import anatomy, pretrained
from corolla.models.anatomy import Anatomy
from corolla.models.sparse import carried, places
from corolla.privacy import calibration, example_level
from corolla.privacy.guarantee import Guarantee
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.tasks import costs
from corolla.server.runs.account import open_account
from corolla.server.runs.journal import Past
from corolla.strategies import offset
from corolla.strategies.listing import registry
from corolla.types import Cost, LoraSpec, Params, TrainerName
from corolla.wire import codec

_POINTS = 10
"""Number of rounds after which epsilon of examples is told, at most."""

_LEVELS = 100
"""Number of epsilons of examples that are computed for these rounds: each takes a tenth of a
second. The last round is told whatever that takes."""


@dataclass(frozen=True)
class Privacy:
    """The guarantees that differential privacy will give to the client with the weakest one."""

    after: Mapping[int, Guarantee]
    """Some rounds, the last one among them → what is promised when it has been."""
    noise: tuple[float, float]
    """The smallest and the largest noise multiplier of all clients."""

    @property
    def end(self) -> Guarantee:
        """The guarantee when all rounds have been."""
        return self.after[max(self.after)]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        spent = [{"round": n, "epsilon": own.to_json()["epsilon"]} for n, own in self.after.items()]
        return {**self.end.to_json(), "noise_multiplier": self.noise, "after": spent}


@dataclass(frozen=True)
class Traffic:
    """Bytes that travel, up and down as seen from a client."""

    up: tuple[int, int]
    """Bytes that a client sends in a round: the least and the most of its classes and rounds."""
    down: tuple[int, int]
    once: int
    """Bytes that a client receives in its first round beside them, at most."""
    at_most: bool
    total_up: int
    total_down: int
    exchange: int
    """The most bytes of one task and its reply."""
    stored: int
    """Bytes of state and updates that the server holds in a round."""


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory of each kind of process; of classes of clients that which takes most."""

    client: Estimate
    server: Estimate
    simulation: Estimate
    choice: Choice | None
    """How a client trains within the budget that was given."""

    def to_json(self) -> dict[str, Any]:
        """The peaks as plain values, without the choice."""
        return {
            "client": _terms(self.client),
            "server": _terms(self.server),
            "simulation": _terms(self.simulation),
        }


@dataclass(frozen=True)
class Duration:
    """Seconds of training, estimated from the speed of this machine."""

    flops: float
    """Measured here, in products of matrices like the model's."""
    client: float
    """Seconds of a client in a round, of the slowest class."""
    round: float
    """Seconds of a simulated round, whose clients train one after another."""


@dataclass(frozen=True)
class CostEstimate:
    """The cost estimate of `corolla plan`."""

    config: RunConfig
    parameters: int
    trained: int
    clients: int
    cohort: int
    traffic: Traffic
    memory: PeakMemory
    duration: Duration
    privacy: Privacy | None
    """None without differential privacy."""
    secure: SecureCost | None
    """None without secure sums."""
    chosen: Mapping[str, Any]
    """The choice under the key `budget`; {} without one. With public rows these decide instead."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        traffic, duration, choice = self.traffic, self.duration, self.memory.choice
        return {
            "config": self.config.model_dump(mode="json"),
            "parameters": self.parameters,
            "trained": self.trained,
            "clients": self.clients,
            "cohort": self.cohort,
            "bytes_per_client_round": {
                "up": traffic.up,
                "down": traffic.down,
                "once": traffic.once,
            },
            "bytes_at_most": traffic.at_most,
            "bytes_total": {"up": traffic.total_up, "down": traffic.total_down},
            "memory": self.memory.to_json(),
            "budget": {"overrides": choice.overrides, "client": _terms(choice.estimate)}
            if choice
            else None,
            "estimated_seconds": {
                "client_round": duration.client,
                "simulated_round": duration.round,
                "from_flops": duration.flops,
            },
            "epsilon": self.privacy and self.privacy.end.to_json()["epsilon"],
            "privacy": self.privacy and self.privacy.to_json(),
            **({"secure_sum": self.secure.to_json()} if self.secure else {}),
            **({"chosen": dict(self.chosen)} if self.chosen else {}),
        }


def plan(config: RunConfig, budget: int | None = None) -> CostEstimate:
    """Returns the cost of a run with `config`, on clients that have `budget` bytes of memory.

    Raises ConfigError where nothing fits, ModelError for a model that is not on this machine.
    """
    model = anatomy.read(config.model)
    if model.positions and config.max_length > model.positions:
        raise ConfigError(
            f"max_length {config.max_length} is more than the {model.positions} positions of "
            f"{config.model}: use --set max-length={model.positions}"
        )
    data = federated.load(config)
    data = replace(data, labels=ordered(config, data.labels))
    labels = len(data.labels) if config.task != "causal" else 0
    model = classifier_sizes.sized(model, labels) if labels else model
    config, told = settle.foreseen(config, model, labels)
    sizes = lengths.estimated(config, labels)
    if model.tokenizer:
        tokenizer = pretrained.load_tokenizer(
            config.model, str(model.tokenizer.parent), config.new_tokens
        )
        data = census.with_targets(config, data, tokenizer)
        encoder = Encoder.of(config, tokenizer, data.labels if labels else ())
        sizes = lengths.exact(encoder, config.dp == "example")
    federation = _federation(config, model, data, labels)
    if config.cohort and config.cohort > len(data.clients):
        raise ConfigError(
            f"cohort {config.cohort} is larger than the {len(data.clients)} clients: lower it"
        )
    promised = privacy(federation, "user" if data.names_users else "example")
    sent = _with_places(traffic(federation), config, model, len(data.clients))
    batches = lengths.batches(federation, data, sizes)
    return CostEstimate(
        config=config,
        parameters=model.values,
        trained=model.values if config.kind.whole else footprint.trained(model, config, labels),
        clients=len(data.clients),
        cohort=federation.cohort_size,
        traffic=sent,
        memory=memory(federation, model, batches, sent, labels, budget),
        duration=duration(federation, model, batches, data),
        privacy=promised,
        secure=secure.of(federation),
        chosen=told.get("budget", {}),
    )


def traffic(federation: Federation) -> Traffic:
    """The bytes of all rounds, from the sizes of what is sent."""
    rounds = _rounds(federation)
    members = [cost for _, paid in rounds for cost in paid]
    up, down = [cost.up for cost in members], [cost.down for cost in members]
    once = max(cost.once for cost in members)
    individual = registry.traits(federation.strategy).individual
    updates = max(sum(c.up for c in paid) for _, paid in rounds) if individual else 2 * max(up)
    return Traffic(
        up=(min(up), max(up)),
        down=(min(down), max(down)),
        once=once,
        at_most=any(cost.at_most for cost in members),
        total_up=sum(times * sum(c.up for c in paid) for times, paid in rounds),
        total_down=sum(times * sum(c.down for c in paid) for times, paid in rounds)
        + len(federation.clients) * once,
        exchange=max(cost.up + cost.down + cost.once for cost in members),
        stored=updates + max(down),
    )


def _with_places(sent: Traffic, config: RunConfig, model: Anatomy, clients: int) -> Traffic:
    """The traffic with the places of a sparse set, where each client is sent them once.

    Where they are exchanged it is sent them again, if it takes part before the next time.
    """
    exchanges = (config.rounds - 1) // config.regrow if config.regrow else 0
    chosen = config.select != "random"  # random ones are drawn by everybody
    if not config.kind.sparse or not (chosen or exchanges):
        return sent
    shapes = model.linear(config.target_modules, config.layers)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = {name: places.count(name, shape, config.rank) for name, shape in shapes.items()}
    once = codec.content_bytes({carried.GROUP: places.blank(sizes, counts)})
    least, most = sent.down
    return replace(
        sent,
        once=sent.once + chosen * once,
        down=(least, most + once if exchanges else most),
        at_most=sent.at_most or bool(exchanges),
        total_down=sent.total_down + clients * (chosen + exchanges) * once,
        exchange=sent.exchange + once,
    )


def memory(
    federation: Federation,
    model: Anatomy,
    batches: Batches,
    sent: Traffic,
    labels: int,
    budget: int | None,
) -> PeakMemory:
    """The peak memory of clients, the server and a simulation. Raises ConfigError as `choose`."""
    config, strategy = federation.config, federation.strategy
    workload = Workload(model, batches.largest, batches.evaluated, labels)

    def of_client(own: RunConfig, trainer: TrainerName, stored: int | None = None) -> Estimate:
        return footprint.client(workload, own, trainer, sent.exchange, stored)

    classes = _classes(config)
    alone = [of_client(own, trainer) for own, trainer in classes]
    worst = max(range(len(classes)), key=lambda i: alone[i].total)
    choice = None
    if budget is not None:
        own, trainer = classes[worst]
        choice = choose(budget, workload, own, trainer=trainer, strategy=strategy)
    together = [of_client(own, trainer, sent.stored) for own, trainer in classes]
    return PeakMemory(
        client=alone[worst],
        server=footprint.server(model, config, batches.evaluated, sent.stored, labels),
        simulation=max(together, key=lambda estimate: estimate.total),
        choice=choice,
    )


def duration(
    federation: Federation, model: Anatomy, batches: Batches, data: FederatedData
) -> Duration:
    """The time of local training, at the speed that is measured now."""
    config = federation.config
    at_a_time = batches.largest.limited(config.micro_batch_size or config.batch_size)
    flops = throughput(model, at_a_time, config.threads)
    seconds = [
        (
            _steps(own, data) * footprint.operations(model, own, trainer, batches.typical)
            + _scored(own, data) * footprint.scoring(model, own, batches.typical)
        )
        / flops
        for own, trainer in _classes(config)
    ]
    return Duration(flops, max(seconds), federation.cohort_size * statistics.fmean(seconds))


def privacy(federation: Federation, unit: Literal["example", "user"] = "example") -> Privacy | None:
    """Returns differential privacy's guarantees; with dp=example to the client with the weakest.

    Every distinct number of examples is looked at: more of them are drawn less often each, in steps
    that go up by whole epochs, so that epsilon rises and falls with the number. Clients of a run
    count by the same function (accounting.epsilon); rounds that are abandoned cost them more.
    """
    config = federation.config
    if config.dp == "none":
        return None
    account = open_account(federation, Past(), unit)
    if why := account.ended(federation, 1):
        raise ConfigError(why)
    if account.level:
        cohort = account.level.cohort
        planned = calibration.client_plan(config, federation.population, cohort)
        rounds = calibration.planned_rounds(config.rounds)
        z = account.level.noise_multiplier
        return Privacy(dict(zip(rounds, planned, strict=True)), (z, z))
    sizes: dict[str, set[int]] = {}
    for client, examples in federation.clients.items():
        sizes.setdefault(federation.class_of(client), set()).add(examples)
    levels = [
        example_level.example_level(config.of_class(name), examples, unit)
        for name, own in sizes.items()
        for examples in sorted(own)
    ]
    distinct = {own.release: own for own in levels}.values()
    often = config.participations or config.rounds
    points = max(1, min(_POINTS, _LEVELS // len(distinct)))
    after = {
        number: max(
            (own.guarantee(min(often, number)) for own in distinct), key=lambda own: own.epsilon
        )
        for number in calibration.planned_rounds(config.rounds, points)
    }
    noises = [own.noise_multiplier for own in levels]
    return Privacy(after, (min(noises), max(noises)))


def _federation(config: RunConfig, model: Anatomy, data: FederatedData, labels: int) -> Federation:
    strategy = build_strategy(config)

    def fresh(spec: LoraSpec) -> Params:
        own = config.model_copy(update={"rank": spec.rank, "ranks": [], "classes": {}})
        in_place = config.kind.whole and strategy.full
        shapes = {} if in_place else footprint.trained_shapes(model, own, labels)
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    numbers = {client: counted(config.dp, split.train) for client, split in data.clients.items()}
    return Federation("0" * 32, config, strategy, numbers, fresh)


def _rounds(federation: Federation) -> list[tuple[int, Sequence[Cost]]]:
    """(how often, the costs of a cohort) of odd and of even rounds: factors may take turns.

    Of each round, where other tensors are trained in each.
    """
    if isinstance(federation.strategy, Choosing):
        return list(subsets.rounds(federation, federation.strategy))
    start = federation.fresh(federation.config.lora)
    begun = offset.planned(federation.config.begins.offset, start)
    state = {**federation.strategy.init(start, federation.config.seed), **begun}
    everyone, size = list(federation.clients), federation.cohort_size
    number = federation.config.rounds
    found = []
    for round, times in ((1, math.ceil(number / 2)), (2, number // 2)):
        if times:
            cohort = federation.sample(everyone, size, round)
            paid = costs(federation, state, round, dict.fromkeys(cohort, 1))
            found.append((times, _cut(federation, list(cohort), paid)))
    return found


def _cut(federation: Federation, cohort: Sequence[str], paid: Sequence[Cost]) -> Sequence[Cost]:
    """The costs with `max_rank`: a state that was cut is sent whole, and has no larger rank."""
    strategy, most = federation.strategy, federation.config.max_rank
    sizes = [federation.size(client) for client in cohort]
    rounds = federation.config.rounds - 1  # the state after the last round is not sent
    if not (most and isinstance(strategy, Stacking) and strategy.rank_after(rounds, sizes) > most):
        return paid
    return [
        replace(cost, down=4 * (most * (size.A + size.B) // size.rank + size.head), at_most=True)
        for cost, size in zip(paid, sizes, strict=True)
    ]


def _classes(config: RunConfig) -> list[tuple[RunConfig, TrainerName]]:
    """The settings and the trainer of each class of clients."""
    names = list(config.classes) or [""]
    return [(config.of_class(name), config.trainer_of(name)) for name in dict.fromkeys(names)]


def _steps(config: RunConfig, data: FederatedData) -> float:
    """Local steps of a client in a round, on average, each of a batch of rows.

    A step of users takes as many rows more as a user has.
    """
    numbers = [(len(own.train), counted(config.dp, own.train)) for own in data.clients.values()]
    return statistics.fmean(
        schedule.steps_per_round(config, units) * rows / units for rows, units in numbers
    )


def _scored(config: RunConfig, data: FederatedData) -> float:
    """Batches that a client scores in a round, on average, to find its hardest rows."""
    rows = (len(own.train) for own in data.clients.values())
    return statistics.fmean(schedule.scored(config, n) / config.batch_size for n in rows)


def _terms(estimate: Estimate) -> dict[str, Any]:
    return {"total": estimate.total, "terms": dict(estimate.terms)}
