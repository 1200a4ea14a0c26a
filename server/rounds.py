"""One round is one function: the same in process, in Flower's simulation and on devices."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Protocol

from corolla import codec, factors, schedule, seedlog, seeds, strategies, tree, wire
from corolla.config import RunConfig
from corolla.errors import RoundError, WireError
from corolla.server import cohort
from corolla.server.aggregate import in_order, read_reply
from corolla.types import (
    Broadcast,
    Cost,
    LoraSpec,
    Metrics,
    Params,
    Payload,
    Size,
    Strategy,
)
from corolla.wire import Kind, Log, Packet, Reply, Task, pack_task

Held = Mapping[str, frozenset[str]]
"""Client → content ids of the cached groups it is known to hold."""


_LONGEST_LOG = wire.MAX_HEADER // 2
"""Bytes of rows that surely fit a message."""

_ACCEPTED = "accepted-"

_SCALARS = ("scalars", "zero_scalars", "skipped_scalars")


class Network(Protocol):
    """Who can be asked: clients in this process, or behind a Flower Grid."""

    def clients(self) -> Mapping[str, int]:
        """Reachable clients and their numbers of training examples."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterable[tuple[str, Packet | None]]:
        """Send each client its packet; yield (client, reply) in any order, None for no answer."""


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round."""

    run_id: str
    config: RunConfig
    strategy: Strategy
    clients: Mapping[str, int]
    fresh: Callable[[LoraSpec], Params]
    """A fresh adapter of a rank: its names and shapes decide which replies are valid."""
    origin: str = ""
    """The version of the first state, where the strategy keeps a log (seedlog.origin)."""

    @property
    def cohort_size(self) -> int:
        """Clients per round."""
        return min(self.config.cohort or 8, len(self.clients))

    def lora(self, client: str) -> LoraSpec:
        """Rank and scaling of one client's adapter."""
        return self.config.client_lora(self._index[client])

    def class_of(self, client: str) -> str:
        """The name of one client's class; "" without classes."""
        return self.config.class_of(self._index[client])

    def size(self, client: str, round: int = 1) -> Size:
        """What decides the form of one client's update."""
        own = self.config.of_class(self.class_of(client))
        steps = schedule.steps_per_round(own, self.clients[client])
        adapter = factors.size(self.fresh(self.lora(client)))
        trainer = self.config.trainer_of(self.class_of(client))
        return replace(
            adapter,
            scalars=steps * own.queries,
            trainer=trainer,
            seed=seeds.derive(self.config.seed, "client", client, round),
            round=round,
            step=schedule.step_size(own, round, self.clients[client]),
        )

    def most_examples(self, client: str) -> int:
        """The most examples a client can have used: a claim is the weight of its update."""
        own = self.config.of_class(self.class_of(client))
        if own.local_epochs is not None:
            return self.clients[client]
        return min(self.clients[client], own.local_steps * own.batch_size)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {client: i for i, client in enumerate(sorted(self.clients))}


@dataclass(frozen=True)
class RoundResult:
    """The state after a round and the facts about it; bytes are payload, framing apart."""

    state: Payload
    held: Held
    metrics: Metrics
    num_examples: Mapping[str, int]
    client_loss: Metrics
    dropped: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    framing_up: int
    framing_down: int
    cost: Cost
    """What the strategy's formula says for these clients; `once` is not in it."""
    memory: Payload = field(default_factory=dict)


@dataclass
class _Traffic:
    up: int = 0
    down: int = 0
    framing_up: int = 0
    framing_down: int = 0


def run_round(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    network: Network,
    on_reply: Callable[[str], None] = lambda client: None,
    memory: Payload | None = None,
) -> RoundResult:
    """Broadcast, let the cohort train, aggregate valid replies in the order of ids, apply.

    `memory` is what the server remembers beside the strategy's state. Commits or leaves everything
    as it was: raises RoundError when fewer than the quorum are valid, or when the aggregate is not
    finite.
    """
    config, strategy = federation.config, federation.strategy
    members = cohort.sample(list(federation.clients), federation.cohort_size, config.seed, round)
    traffic = _Traffic()
    tasks = make_tasks(federation, state, held, round, Kind.TRAIN, members, traffic)
    first = next(iter(tasks.values()))
    keeps = strategies.traits(strategy).keeps
    content = {*first.cached.values(), *([first.log.version] if first.log else [])}
    known = dict(held)
    aggregator = strategy.aggregator()
    examples: dict[str, int] = {}
    metrics: dict[str, Metrics] = {}
    dropped: dict[str, str] = {}
    for client, reply, update, why in _answers(federation, state, tasks, held, network, traffic):
        on_reply(client)
        if reply is None:
            dropped[client] = why
            if left := _only_accepted(known, client):
                known[client] = left
            else:
                known.pop(client, None)
            continue
        aggregator.add(update, reply.num_examples)
        examples[client], metrics[client] = reply.num_examples, reply.metrics
        known[client] = frozenset(content | ({_accepted(round)} if keeps else set()))
    needed = math.ceil(config.quorum * len(members))
    if len(examples) < needed:
        reason = next(iter(dropped.items()), ("", "none was asked"))
        raise RoundError(
            f"round {round}: {len(examples)} of {len(members)} clients gave a valid update, "
            f"{needed} are needed; {reason[0]}: {reason[1]}"
        )
    after, applied = strategy.apply(state, aggregator.finalise())
    if not all(tree.finite(params) for params in after.values()):
        raise RoundError(f"round {round}: the aggregate is not finite")
    return RoundResult(
        state=after,
        held=known,
        metrics={**_mean(metrics, examples), **applied},
        num_examples=examples,
        client_loss={c: m["train_loss"] for c, m in metrics.items() if "train_loss" in m},
        dropped=dropped,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        framing_up=traffic.framing_up,
        framing_down=traffic.framing_down,
        cost=_formula(strategy.cost([federation.size(client, round) for client in examples])),
        memory=dict(memory or {}),
    )


def evaluate_clients(
    federation: Federation, state: Payload, held: Held, round: int, network: Network
) -> dict[str, Metrics]:
    """The global model's scores on up to `eval_clients` clients' own held-out examples."""
    size = min(federation.config.eval_clients, len(federation.clients))
    members = cohort.sample(list(federation.clients), size, federation.config.seed, -1)
    if not members:
        return {}
    tasks = make_tasks(federation, state, held, round, Kind.EVALUATE, members, _Traffic())
    answers = _answers(federation, state, tasks, held, network, _Traffic())
    return {
        client: {**reply.metrics, "examples": reply.num_examples}
        for client, reply, _, _ in answers
        if reply is not None and "loss" in reply.metrics
    }


def _answers(
    federation: Federation,
    state: Payload,
    tasks: Mapping[str, Task],
    held: Held,
    network: Network,
    traffic: _Traffic,
) -> Iterator[tuple[str, Reply | None, Payload, str]]:
    """(client, valid reply or None, its update, why not) in the order of clients.

    A client that has lost cached groups is asked once more, with everything: a device may forget.
    """
    packets = {client: pack_task(task) for client, task in tasks.items()}
    for client, packet in in_order(network.ask(packets), list(tasks)):
        task, answer = tasks[client], packet
        try:
            reply, update = _checked(federation, client, task, answer, traffic)
            if reply.missing:
                forgot = {client: _only_accepted(held, client)}
                full = make_tasks(
                    federation, state, forgot, task.round, task.kind, [client], traffic
                )
                task = full[client]
                again = in_order(network.ask({client: pack_task(task)}), [client])
                reply, update = _checked(federation, client, task, next(again)[1], traffic)
            if reply.error or reply.missing:
                raise WireError(reply.error or "cached groups are missing")
            yield client, reply, update, ""
        except WireError as error:
            yield client, None, {}, str(error)


def _checked(
    federation: Federation, client: str, task: Task, packet: Packet | None, traffic: _Traffic
) -> tuple[Reply, Payload]:
    """A reply that passed all checks; counts its bytes. Raises WireError."""
    if packet is None:
        raise WireError("no answer")
    like = None
    if task.kind == Kind.TRAIN:
        fresh = federation.fresh(federation.lora(client))
        like = federation.strategy.update_like(fresh, federation.size(client, task.round))
    reply, update = read_reply(packet, client, task, like)
    if reply.num_examples > federation.most_examples(client) and not reply.error:
        raise WireError(f"reply claims {reply.num_examples} examples, more than it can have")
    content = wire.content_bytes(update)
    traffic.up += content
    traffic.framing_up += len(packet.header) + len(packet.payload) - content
    return reply, update


def make_tasks(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    kind: Kind,
    members: list[str],
    traffic: _Traffic,
) -> dict[str, Task]:
    """The task of each member: the broadcast, with only what it does not hold of cached groups.

    Of a log it gets the rows after the version it holds, or a snapshot where that is less.
    """
    broadcast = federation.strategy.broadcast(state)
    if broadcast.snapshot is not None:
        broadcast = replace(broadcast, snapshot=cache(broadcast.snapshot))
    cached = {group: codec.content_id(params) for group, params in broadcast.cached.items()}
    rows = broadcast.log
    versions = seedlog.versions(federation.origin, rows) if rows is not None else []
    version = tree.digest_all(state)
    sent: dict[object, tuple[bytes, Payload, Log | None, int]] = {}
    tasks: dict[str, Task] = {}
    for client in members:
        known = held.get(client, frozenset())
        lacks = frozenset(g for g, i in cached.items() if i not in known)
        since = next((v for v in reversed(versions) if v in known), federation.origin)
        lora = federation.lora(client)
        form = (lacks, since, lora if broadcast.fitted else None)
        if form not in sent:
            payload = {**broadcast.payload, **{g: broadcast.cached[g] for g in lacks}}
            payload |= broadcast.fitted(lora) if broadcast.fitted else {}
            log, extra = _log(broadcast, versions, since, state)
            payload = {**payload, **extra}
            content = wire.content_bytes(payload)
            content += sum(wire.scalar_bytes(row) for row in (log.rows if log else ()))
            sent[form] = (*wire.enclose(payload), log, content)
        data, scalars, log, content = sent[form]
        settings = {
            "lora": vars(lora),
            "class": federation.class_of(client),
            "population": len(federation.clients),
            "accepted": _last_accepted(known),
            "run": federation.config.model_dump(mode="json"),
        }
        tasks[client] = Task(
            run_id=federation.run_id,
            round=round,
            base_version=version,
            kind=kind,
            config=json.dumps(settings),
            cached=cached,
            payload=data,
            scalars=scalars,
            log=log,
        )
        try:
            header = len(pack_task(tasks[client]).header)
        except ValueError as error:
            raise RoundError(f"round {round}: a task does not fit a message: {error}") from error
        traffic.down += content
        traffic.framing_down += len(data) + header - content
    return tasks


def _log(
    broadcast: Broadcast, versions: Sequence[str], since: str, state: Payload
) -> tuple[Log | None, Payload]:
    """What a client at a version needs to reach the last: (rows, or a snapshot as a payload)."""
    if broadcast.log is None:
        return None, {}
    number, last = len(broadcast.log), versions[-1]
    rows = broadcast.log[versions.index(since) :]
    size = sum(wire.scalar_bytes(row) for row in rows)
    if broadcast.snapshot is not None and size > min(
        wire.content_bytes({"start": state["start"]}), _LONGEST_LOG
    ):
        start = broadcast.snapshot()
        return Log(versions[0], last, last, (), number, codec.content_id(start)), {"start": start}
    return Log(versions[0], since, last, rows, number), {}


def _accepted(round: int) -> str:
    """How Held notes the last round whose update of a client was accepted."""
    return f"{_ACCEPTED}{round}"


def _last_accepted(known: AbstractSet[str]) -> int:
    return max(
        (int(i.removeprefix(_ACCEPTED)) for i in known if i.startswith(_ACCEPTED)), default=0
    )


def _only_accepted(held: Held, client: str) -> frozenset[str]:
    """What the server must remember even of a client whose memory it does not count on."""
    return frozenset(i for i in held.get(client, ()) if i.startswith(_ACCEPTED))


def _formula(costs: Sequence[Cost]) -> Cost:
    """The sum over a cohort."""
    up, down = sum(cost.up for cost in costs), sum(cost.down for cost in costs)
    return Cost(up, down, at_most=any(cost.at_most for cost in costs))


def _mean(metrics: Mapping[str, Metrics], examples: Mapping[str, int]) -> Metrics:
    """Example-weighted means of what clients report; tokens, steps and skips are summed."""
    summed = ("target_tokens", "local_steps", "skipped", *_SCALARS)
    names = sorted({name for reported in metrics.values() for name in reported})
    result: dict[str, float] = {}
    for name in names:
        values = {c: m[name] for c, m in metrics.items() if name in m}
        weight = sum(examples[c] for c in values)
        weighted = math.fsum(value * examples[c] for c, value in values.items())
        result[name] = math.fsum(values.values()) if name in summed else weighted / weight
    return result
