"""What a run will cost, before anything is loaded: bytes, memory, time, privacy.

Reads the data, config.json and the headers of the model's files; never its weights.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla import seeds
from corolla.client.device.machine import Choice, Workload, choose
from corolla.config import schedule
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.federated import FederatedData
from corolla.data.rows import Example
from corolla.errors import ConfigError
from corolla.host.text import human_bytes
from corolla.models import anatomy, footprint
from corolla.models.anatomy import Anatomy
from corolla.models.footprint import Batch, Estimate
from corolla.privacy import calibration, example_level
from corolla.privacy.guarantee import Guarantee
from corolla.server.rounds import spending
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.tasks import costs
from corolla.server.runs.journal import Past
from corolla.strategies import registry
from corolla.types import LoraSpec, Params

_SCORED = 8
"""Sequences that are evaluated at a time."""
_TASKS = 256
"""Of a long run, so many tasks show which batches clients draw."""
_CHARACTERS = 3
"""Of a token, where the tokenizer cannot be asked: a text has hardly more tokens than this says."""
_CALIBRATION = 0.2
_POINTS = 10
"""Rounds after which epsilon of examples is told: each takes a second."""
_SHOWN = 5
"""Rounds whose epsilon the table tells."""
NO_PRIVACY = (
    "no differential privacy: nothing bounds what updates tell of a client's data (epsilon ∞)"
)


@dataclass(frozen=True)
class Privacy:
    """What differential privacy will promise, to whom it promises least."""

    after: Mapping[int, Guarantee]
    """Some rounds, the last one among them → what is promised when it has been."""
    noise: tuple[float, float]
    """The smallest and the largest noise multiplier of all clients."""

    @property
    def end(self) -> Guarantee:
        """What is promised when all rounds have been."""
        return self.after[max(self.after)]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        spent = [{"round": n, "epsilon": own.to_json()["epsilon"]} for n, own in self.after.items()]
        return {**self.end.to_json(), "noise_multiplier": self.noise, "after": spent}


@dataclass(frozen=True)
class Plan:
    """What `corolla plan` says. Bytes up and down are seen from a client."""

    config: RunConfig
    parameters: int
    trained: int
    clients: int
    cohort: int
    up: tuple[int, int]
    """Bytes that a client sends in a round: the least and the most of its classes and rounds."""
    down: tuple[int, int]
    once: int
    """Bytes that a client receives in its first round beside them, at most."""
    at_most: bool
    total_up: int
    total_down: int
    client: Estimate
    server: Estimate
    simulation: Estimate
    choice: Choice | None
    """How a client trains within the budget that was given."""
    flops: float
    """Measured here, in products of matrices like the model's."""
    seconds_client: float
    seconds_round: float
    privacy: Privacy | None
    """None without differential privacy."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""

        def memory(estimate: Estimate) -> dict[str, Any]:
            return {"total": estimate.total, "terms": dict(estimate.terms)}

        choice = self.choice
        return {
            "config": self.config.model_dump(mode="json"),
            "parameters": self.parameters,
            "trained": self.trained,
            "clients": self.clients,
            "cohort": self.cohort,
            "bytes_per_client_round": {"up": self.up, "down": self.down, "once": self.once},
            "bytes_at_most": self.at_most,
            "bytes_total": {"up": self.total_up, "down": self.total_down},
            "memory": {
                "client": memory(self.client),
                "server": memory(self.server),
                "simulation": memory(self.simulation),
            },
            "budget": {"overrides": choice.overrides, "client": memory(choice.estimate)}
            if choice
            else None,
            "estimated_seconds": {
                "client_round": self.seconds_client,
                "simulated_round": self.seconds_round,
                "from_flops": self.flops,
            },
            "epsilon": self.privacy and self.privacy.end.to_json()["epsilon"],
            "privacy": self.privacy and self.privacy.to_json(),
        }


def plan(config: RunConfig, budget: int | None = None) -> Plan:
    """What a run with `config` will cost, on clients that have `budget` bytes of memory.

    Raises ConfigError where nothing fits, ModelError for a model that is not on this machine.
    """
    model = anatomy.read(config.model)
    if model.positions and config.max_length > model.positions:
        raise ConfigError(
            f"max_length {config.max_length} is more than the {model.positions} positions of "
            f"{config.model}: use --set max-length={model.positions}"
        )
    known = federated.load(config)
    labels = len(known.labels) if config.task != "causal" else 0
    federation = _federation(config, model, known, labels)
    if config.cohort and config.cohort > len(known.clients):
        raise ConfigError(
            f"cohort {config.cohort} is larger than the {len(known.clients)} clients: lower it"
        )
    promised = _privacy(federation)
    rounds = _rounds(federation)
    members = [cost for _, paid in rounds for cost in paid]
    messages = max(c.up + c.down + c.once for c in members)
    alike = registry.traits(federation.strategy).individual
    sent = max(sum(c.up for c in paid) for _, paid in rounds)
    kept = (sent if alike else 2 * max(c.up for c in members)) + max(c.down for c in members)
    lengths = Lengths(model, config, labels)
    drawn = _drawn(federation, known, lengths)
    batch = _largest(drawn)
    scored = sorted(lengths(federated.spread(known.heldout, config.eval_examples)))
    evaluated = _padded(scored[-_SCORED:])
    names = list(config.classes) or [""]
    each = [(config.of_class(name), config.trainer_of(name)) for name in dict.fromkeys(names)]
    alone = [
        footprint.client(model, own, kind, batch, evaluated, messages, labels) for own, kind in each
    ]
    together = [
        footprint.client(model, own, kind, batch, evaluated, messages, labels, kept)
        for own, kind in each
    ]
    choice = None
    if budget is not None:
        worst = max(range(len(each)), key=lambda i: alone[i].total)
        own, kind = each[worst]
        choice = choose(budget, Workload(model, batch, evaluated, labels), own, trainer=kind)
    at_a_time = batch.limited(config.micro_batch_size or config.batch_size)
    flops = throughput(model, at_a_time, config.threads)
    usual = _typical(drawn, config)
    seconds = [
        _steps(own, known) * footprint.operations(model, own, kind, usual) / flops
        for own, kind in each
    ]
    return Plan(
        config=config,
        parameters=model.values,
        trained=model.values
        if config.parameters == "full"
        else footprint.trained(model, config, labels),
        clients=len(known.clients),
        cohort=federation.cohort_size,
        up=(min(c.up for c in members), max(c.up for c in members)),
        down=(min(c.down for c in members), max(c.down for c in members)),
        once=max(c.once for c in members),
        at_most=any(c.at_most for c in members),
        total_up=sum(times * sum(c.up for c in paid) for times, paid in rounds),
        total_down=sum(times * sum(c.down for c in paid) for times, paid in rounds)
        + len(known.clients) * max(c.once for c in members),
        client=max(alone, key=lambda own: own.total),
        server=footprint.server(model, config, evaluated, kept, labels),
        simulation=max(together, key=lambda own: own.total),
        choice=choice,
        flops=flops,
        seconds_client=max(seconds),
        seconds_round=federation.cohort_size * statistics.fmean(seconds),
        privacy=promised,
    )


def _privacy(federation: Federation) -> Privacy | None:
    """Of dp=example, of the smallest and the largest client, what is worse.

    Examples of the smallest are drawn most often; noise that is made for a budget makes up for it.
    """
    config = federation.config
    if config.dp == "none":
        return None
    account = spending.begin(federation, Past())
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
        example_level.example_level(config.of_class(name), examples)
        for name, own in sizes.items()
        for examples in sorted({min(own), max(own)})
    ]
    often = config.participations or config.rounds
    after = {
        number: max(
            (own.guarantee(min(often, number)) for own in levels), key=lambda own: own.epsilon
        )
        for number in calibration.planned_rounds(config.rounds, _POINTS)
    }
    noises = [own.noise_multiplier for own in levels]
    return Privacy(after, (min(noises), max(noises)))


# --- bytes ----------------------------------------------------------------------------------------


def _federation(config: RunConfig, model: Anatomy, known: FederatedData, labels: int) -> Federation:
    strategy = build_strategy(config)

    def fresh(spec: LoraSpec) -> Params:
        own = config.model_copy(update={"rank": spec.rank, "ranks": [], "classes": {}})
        in_place = config.parameters == "full" and strategy.full
        shapes = {} if in_place else footprint.trained_shapes(model, own, labels)
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    numbers = {client: len(split.train) for client, split in known.clients.items()}
    return Federation("0" * 32, config, strategy, numbers, fresh)


def _rounds(federation: Federation) -> list[tuple[int, list[Any]]]:
    """(how often, the costs of a cohort) of odd and of even rounds: factors may take turns."""
    start = federation.fresh(federation.config.lora)
    state = federation.strategy.init(start, federation.config.seed)
    everyone, size = list(federation.clients), federation.cohort_size
    number = federation.config.rounds
    found = []
    for round, times in ((1, math.ceil(number / 2)), (2, number // 2)):
        if times:
            cohort = federation.sample(everyone, size, round)
            found.append((times, costs(federation, state, round, dict.fromkeys(cohort, 1))))
    return found


# --- sequences ------------------------------------------------------------------------------------


class Lengths:
    """(tokens, targets) of the sequences of examples, as encoding.Encoder makes them, nearly."""

    def __init__(self, model: Anatomy, config: RunConfig, labels: int) -> None:
        self.most, self.labels = config.max_length, labels
        self._count = _counter(model)

    def __call__(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        counts = self._count([text for row in examples for text in (row.prompt or "", row.text)])
        found = []
        for row, asked, told in zip(examples, counts[::2], counts[1::2], strict=True):
            whole = asked + told + 1
            if self.labels:
                found.append((min(self.most, whole), 1))
            elif row.prompt is not None:
                found.append((min(self.most, whole), max(1, min(self.most, whole) - asked)))
            else:  # windows with one token of overlap
                cuts = range(0, whole - 1, self.most - 1)
                sizes = [min(self.most, whole - start) for start in cuts]
                found += [(size, size - 1) for size in sizes]
        return found


def _counter(model: Anatomy) -> Callable[[Sequence[str]], list[int]]:
    """Texts → how many tokens each has."""
    if model.tokenizer is None:
        return lambda texts: [math.ceil(len(text) / _CHARACTERS) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.tokenizer))
    return lambda texts: [len(own.ids) for own in tokenizer.encode_batch(list(texts))]


def _drawn(federation: Federation, known: FederatedData, lengths: Lengths) -> list[Batch]:
    """The micro-batches that clients train on, those that a run will draw: of its first tasks."""
    tasks = [
        (round, client)
        for round in range(1, min(federation.config.rounds, _TASKS) + 1)
        for client in federation.sample(list(federation.clients), federation.cohort_size, round)
    ][:_TASKS]
    own = {client: lengths(known.clients[client].train) for _, client in tasks}
    found = []
    for round, client in tasks:
        config = federation.config.of_class(federation.class_of(client))
        seed = seeds.derive(federation.config.seed, "client", client, round)
        size = config.micro_batch_size or config.batch_size
        for indices in schedule.batches(config, len(own[client]), seed):
            rows = [own[client][i] for i in indices]
            found += [_padded(rows[at : at + size]) for at in range(0, len(rows), size)]
    return found


def _padded(rows: Sequence[tuple[int, int]]) -> Batch:
    return Batch(len(rows), max(length for length, _ in rows), sum(n for _, n in rows))


def _largest(batches: Sequence[Batch]) -> Batch:
    """The most of everything."""
    return Batch(
        max(batch.sequences for batch in batches),
        max(batch.tokens for batch in batches),
        max(batch.targets for batch in batches),
    )


def _typical(batches: Sequence[Batch], config: RunConfig) -> Batch:
    """A step's mean numbers of positions and targets, as one batch."""
    size = config.batch_size
    share = size / statistics.fmean(batch.sequences for batch in batches)
    positions = share * statistics.fmean(batch.positions for batch in batches)
    targets = share * statistics.fmean(batch.targets for batch in batches)
    return Batch(size, math.ceil(positions / size), math.ceil(targets))


def _steps(config: RunConfig, known: FederatedData) -> float:
    """Local steps of a client in a round, on average."""
    return statistics.fmean(
        schedule.steps_per_round(config, len(split.train)) for split in known.clients.values()
    )


def throughput(model: Anatomy, batch: Batch, threads: int) -> float:
    """Floating-point operations a second of this machine's CPU, in a product like the model's."""
    if threads:
        torch.set_num_threads(threads)
    inputs = torch.ones(batch.positions, model.hidden)
    matrix = torch.ones(model.hidden, model.intermediate)
    inputs @ matrix
    done, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < _CALIBRATION or not done:
        inputs @ matrix
        done += 1
    return 2.0 * done * inputs.numel() * model.intermediate / took


# --- for people -----------------------------------------------------------------------------------


def print_plan(console: Console, found: Plan, budget: int | None) -> None:
    """The plan as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    limit = "at most " if found.at_most else ""

    def between(pair: tuple[int, int]) -> str:
        return limit + " to ".join(dict.fromkeys(map(human_bytes, pair)))

    config = found.config
    once = f"; once {human_bytes(found.once)}" if found.once else ""
    rows: list[tuple[str, str]] = [
        ("model", f"{config.model}: {found.parameters:,} parameters, {found.trained:,} trained"),
        ("clients", f"{found.clients}, {found.cohort} a round, {config.rounds} rounds"),
        ("sent by a client a round", between(found.up)),
        ("received a round", between(found.down) + once),
        (
            "sent and received in all",
            f"{limit}{human_bytes(found.total_up)} and {human_bytes(found.total_down)}",
        ),
        ("peak memory of a client", _memory(found.client)),
        ("peak memory of the server", _memory(found.server)),
        ("peak memory of a simulation", _memory(found.simulation)),
    ]
    if found.choice and budget is not None:
        changes = ", ".join(f"{k}={v}" for k, v in found.choice.overrides.items())
        how = f"with {changes}: {_memory(found.choice.estimate)}" if changes else "as configured"
        rows.append((f"within {human_bytes(budget)}", how))
    rows += [
        (
            "time of a client a round",
            f"about {_time(found.seconds_client)}, estimated from {found.flops / 1e9:.0f} GFLOP/s "
            f"measured here",
        ),
        ("time of a simulated round", f"about {_time(found.seconds_round)}, estimated"),
        ("privacy", found.privacy.end.line() if found.privacy else NO_PRIVACY),
    ]
    if found.privacy:
        rows += _promised(found.privacy)
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table, highlight=False)


def _promised(found: Privacy) -> list[tuple[str, str]]:
    """What is spent on the way, and the noise."""
    shown = list(found.after.items())
    shown = shown[:: max(1, math.ceil(len(shown) / _SHOWN))]
    spent = ", ".join(f"{own.epsilon:.3g} after round {number}" for number, own in shown)
    noise = " to ".join(dict.fromkeys(f"{z:.4g}" for z in found.noise))
    each = ", by the examples of a client" if found.noise[0] < found.noise[1] else ""
    return [("epsilon on the way", spent), ("noise multiplier", noise + each)]


def _memory(estimate: Estimate) -> str:
    largest = sorted(estimate.terms.items(), key=lambda term: -term[1])[:3]
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in largest)
    return f"{human_bytes(estimate.total)} ({parts}, …)"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
