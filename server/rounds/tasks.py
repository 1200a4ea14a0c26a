"""The tasks that a server sends to the clients of a round, and their cost by formula."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import RoundError
from corolla.interfaces import PricedByState, Strategy
from corolla.models.sparse import carried
from corolla.server.rounds import expectations
from corolla.server.rounds.federation import Federation, Held
from corolla.tensors import tree
from corolla.types import Broadcast, Cost, LoraSpec, Payload, Size
from corolla.wire import codec, limits, messages, scalar_groups
from corolla.wire.compression import PLAIN, Pipeline
from corolla.wire.envelope import Envelope, Sealed
from corolla.wire.messages import Kind, Log, Task, pack_task
from corolla.wire.task_settings import TaskSettings

_LONGEST_LOG = limits.MAX_HEADER // 2
"""Bytes of rows that surely fit a message."""

_ACCEPTED = "accepted-"

_OWN = (
    *("model", "data", "columns", "splits", "subset", "engine", "device", "threads"),
    *("availability", "public", "public_examples", "start", "select", "spectrum", "explored"),
)
"""Settings of a server that are nothing to devices that have their own."""


@dataclass
class Traffic:
    """The traffic of a round, counted as it is sent and read."""

    up: int = 0
    down: int = 0
    framing_up: int = 0
    framing_down: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    """Payload bytes of each member's task; not what is sent again to who forgot."""
    took: dict[str, float] = field(default_factory=dict)
    """Simulated seconds until each reply."""


@dataclass(frozen=True)
class _Content:
    """The content of a task, packed."""

    sealed: Sealed
    log: Log | None
    like: Payload | None
    """The dense groups, whose form the receiver needs; None where nothing is compressed."""
    size: int
    """Bytes of the values, framing apart."""


class _Contents:
    """The contents of the tasks of a round: packed once for all members that are sent the same."""

    def __init__(self, federation: Federation, state: Payload, round: int, kind: Kind) -> None:
        own, support = carried.apart(state)
        broadcast = federation.strategy.broadcast(own)
        broadcast = replace(broadcast, cached={**broadcast.cached, **support})
        if broadcast.snapshot is not None:
            broadcast = replace(broadcast, snapshot=cache(broadcast.snapshot))
        self.federation, self.state, self.round = federation, state, round
        down = federation.config.downlink
        # What is measured is the model of the run, not the part of it that training starts from.
        self.envelope = Envelope(PLAIN if kind != Kind.TRAIN and down.needs_differences else down)
        self.broadcast, rows = broadcast, broadcast.log
        self.cached = {group: codec.content_id(own) for group, own in broadcast.cached.items()}
        self.versions = seedlog.versions(federation.origin, rows) if rows is not None else []
        self._made: dict[object, _Content] = {}

    def of(self, member: str, known: AbstractSet[str]) -> _Content:
        """Returns the content for a member that holds the content ids `known`.

        Of a log it gets the rows after the version it holds, or a snapshot where that is less.
        """
        lacks = tuple(g for g, i in self.cached.items() if i not in known)
        since = next((v for v in reversed(self.versions) if v in known), self.federation.origin)
        lora = self.federation.lora(member)
        form = (lacks, since, lora if self.broadcast.fitted else None)
        if form not in self._made:
            self._made[form] = self._make(lacks, since, lora)
        return self._made[form]

    def _make(self, lacks: Sequence[str], since: str, lora: LoraSpec) -> _Content:
        log, extra = _log(self.broadcast, self.versions, since, self.state)
        beside = {**{g: self.broadcast.cached[g] for g in lacks}, **extra}
        config, payload = self.federation.config, _of_each_round(self.broadcast, lora)
        seed = seeds.derive(config.seed, "broadcast", self.round)
        sealed = self.envelope.seal(payload, seed, beside=beside)
        rows = sum(scalar_groups.scalar_bytes(row) for row in (log.rows if log else ()))
        return _Content(sealed, log, self.envelope.like(payload), sealed.size + rows)


def make_tasks(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    kind: Kind,
    members: Mapping[str, int],
    traffic: Traffic,
) -> dict[str, Task]:
    """The task of each member: the broadcast, with only what it does not hold of cached groups.

    `members` says how many updates each is asked for.
    """
    contents, version = _Contents(federation, state, round, kind), tree.digest_all(state)
    run = run_settings(federation.config, federation.own_devices)
    tasks: dict[str, Task] = {}
    for client, seats in members.items():
        known = held.get(client, frozenset())
        content = contents.of(client, known)
        settings = _settings(federation, client, known, content.like, run)
        tasks[client] = task = Task(
            run_id=federation.run_id,
            round=round,
            base_version=version,
            kind=kind,
            config=settings.to_json(),
            cached=contents.cached,
            payload=content.sealed.data,
            scalars=content.sealed.scalars,
            log=content.log,
            model_sha256=federation.model_sha256,
            seats=seats if client in federation.seats else 0,
        )
        traffic.sent.setdefault(client, content.size)
        traffic.down += content.size
        traffic.framing_down += len(task.payload) + _header_bytes(task) - content.size
    return tasks


def _header_bytes(task: Task) -> int:
    """Returns a task's header bytes. Raises RoundError when it does not fit a message."""
    try:
        return len(pack_task(task).header)
    except ValueError as error:
        raise RoundError(f"round {task.round}: a task does not fit a message: {error}") from error


def _settings(
    federation: Federation,
    member: str,
    known: AbstractSet[str],
    like: Payload | None,
    run: Mapping[str, Any],
) -> TaskSettings:
    """Returns the settings of a member's task; `like` has the form of what is compressed in it."""
    lora = federation.lora(member)
    gateway = member in federation.seats  # it has no model: it is told its phones' adapters
    return TaskSettings(
        lora,
        federation.class_of(member),
        federation.population,
        _last_accepted(known),
        run,
        like,
        labels=federation.labels if federation.own_devices else None,
        fresh={"adapter": federation.fresh(lora)} if gateway else None,
        chosen=federation.chosen if gateway else (),
    )


def run_settings(config: RunConfig, own_devices: bool) -> Mapping[str, Any]:
    """The settings of the run as a client gets them; devices of their own get no folder of ours.

    What follows from a setting that stays here is written out: the learning rate of each class.
    """
    run = config.model_dump(mode="json")
    if not own_devices:
        return run
    classes = {c: {**own, "lr": config.of_class(c).lr} for c, own in run["classes"].items()}
    ours = {key: value for key, value in run.items() if key not in _OWN}
    return {**ours, "strategy": Path(config.strategy).name, "classes": classes}


def _of_each_round(broadcast: Broadcast, lora: LoraSpec) -> Payload:
    """Returns the groups that a client gets each time; the rest of a broadcast it gets once."""
    return {**broadcast.payload, **(broadcast.fitted(lora) if broadcast.fitted else {})}


def _log(
    broadcast: Broadcast, versions: Sequence[str], since: str, state: Payload
) -> tuple[Log | None, Payload]:
    """Returns (rows, or a snapshot as a payload) to bring a client from a version to the last."""
    if broadcast.log is None:
        return None, {}
    number, last = len(broadcast.log), versions[-1]
    rows = broadcast.log[versions.index(since) :]
    size = sum(scalar_groups.scalar_bytes(row) for row in rows)
    if broadcast.snapshot is not None and size > min(
        messages.content_bytes({"start": state["start"]}), _LONGEST_LOG
    ):
        start = broadcast.snapshot()
        return Log(versions[0], last, last, (), number, codec.content_id(start)), {"start": start}
    return Log(versions[0], since, last, rows, number), {}


def accepted_note(round: int) -> str:
    """How Held notes the last round whose update of a client was accepted."""
    return f"{_ACCEPTED}{round}"


def _last_accepted(known: AbstractSet[str]) -> int:
    return max(
        (int(i.removeprefix(_ACCEPTED)) for i in known if i.startswith(_ACCEPTED)), default=0
    )


def trained(held: Held) -> frozenset[str]:
    """The members that keep something of an update which was accepted."""
    return frozenset(member for member, known in held.items() if _last_accepted(known))


def accepted_only(held: Held, client: str) -> frozenset[str]:
    """Returns the notes to remember even of a client whose memory the server does not count on."""
    return frozenset(i for i in held.get(client, ()) if i.startswith(_ACCEPTED))


def costs(
    federation: Federation, state: Payload, round: int, updates: Mapping[str, int]
) -> list[Cost]:
    """The strategy's formula for each member, with the codec's for what that compresses.

    `updates` says how many came from each: a gateway gets one broadcast for all, and sends a
    partial aggregate, or as many updates as it has.
    """
    federation = federation.at(state)
    config, strategy = federation.config, federation.strategy
    sizes = [federation.size(client, round) for client in updates]
    own, support = carried.apart(state)
    costs = _with(support, priced(strategy, own, sizes))
    broadcast = strategy.broadcast(own) if config.codec_down else Broadcast({})
    for i, (client, count) in enumerate(updates.items()):
        lora = federation.lora(client)
        if config.secure_sum:
            costs[i] = replace(costs[i], up=expectations.masked_bytes(federation, round))
        if config.codec:
            like = expectations.like(federation, client, round, federation.class_of(client))
            saved, at_most = _saved(config.uplink, like)
            at_most = at_most or costs[i].at_most
            costs[i] = replace(costs[i], up=costs[i].up - saved, at_most=at_most)
        if config.codec_down:
            payload = _of_each_round(broadcast, lora)
            saved, at_most = _saved(config.downlink, payload)
            at_most = at_most or costs[i].at_most
            costs[i] = replace(costs[i], down=costs[i].down - saved, at_most=at_most)
        if client in federation.seats:
            costs[i] = _of_gateway(federation, client, round, count, costs[i])
    return costs


def priced(strategy: Strategy, state: Payload, sizes: Sequence[Size]) -> Sequence[Cost]:
    """The strategy's formula, which for some depends on the state of the server."""
    if isinstance(strategy, PricedByState):
        return strategy.cost_from(state, sizes)
    return strategy.cost(sizes)


def _with(support: Payload, costs: Sequence[Cost]) -> list[Cost]:
    """The costs with the places of a sparse set, which each client is sent once."""
    once = codec.content_bytes(support)
    return [replace(cost, once=cost.once + once) for cost in costs]


def _of_gateway(federation: Federation, gateway: str, round: int, count: int, one: Cost) -> Cost:
    """Returns the Cost of `count` updates of phones; one of the gateway's own class costs `one`.

    Phones may be of other classes: at most the dearest, as which of them came is not said here.
    """
    names = federation.classes_of(gateway)
    at_most = one.at_most or len(names) > 1
    if federation.partial:
        joined = expectations.expected(federation, gateway, Kind.TRAIN, round).sums or {}
        return replace(one, up=messages.content_bytes(joined), at_most=at_most)
    sizes = [federation.size(gateway, round, kind=name) for name in names[1:]]
    others = [cost.up for size in sizes for cost in federation.strategy.cost([size])]
    return replace(one, up=count * max([one.up, *others]), at_most=at_most)


def _saved(pipeline: Pipeline, payload: Payload) -> tuple[int, bool]:
    """Bytes that a codec saves on a payload, at least or exactly."""
    dense, _ = scalar_groups.split(payload)
    if not dense:
        return 0, False
    size, at_most = pipeline.content_bytes(dense)
    return codec.content_bytes(dense) - size, at_most


def formula(costs: Sequence[Cost]) -> Cost:
    """The sum over a cohort."""
    up, down = sum(cost.up for cost in costs), sum(cost.down for cost in costs)
    return Cost(up, down, at_most=any(cost.at_most for cost in costs))
