"""One round is one function: the same in process, in Flower's simulation and on devices."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from corolla import robust, strategies, tree, wire
from corolla.config import RunConfig
from corolla.errors import RoundError, WireError
from corolla.robust import Robust
from corolla.server import buffer, clock
from corolla.server.aggregate import in_order, read_reply
from corolla.server.buffer import Flight
from corolla.server.federation import Federation, Held, Network
from corolla.server.tasks import Traffic, accepted_note, accepted_only, costs, formula, make_tasks
from corolla.types import (
    Aggregator,
    Cost,
    Metrics,
    Payload,
)
from corolla.wire import Kind, Packet, Reply, Task, pack_task, unpack_reply

_NORMS = "norms"
"""The group of a server's memory with the median norm of the updates of each round."""

_SCALARS = ("scalars", "zero_scalars", "skipped_scalars")


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
    sampling_probability: float
    """Of each reachable client, their mean if selection is weighted; the part of the federation
    that is at work at a time, if updates are buffered."""
    sim_seconds: float | None = None
    memory: Payload = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of one task: a valid reply and its update, or why there is none.

    `round` is that of the task, `content` the content ids that its client now holds.
    """

    client: str
    round: int
    content: frozenset[str]
    reply: Reply | None
    update: Payload
    why: str


@dataclass(frozen=True)
class _Gathering:
    """The answers a round is made of, at best `wanted` valid ones, and the server's memory."""

    answers: Iterable[Answer]
    wanted: int
    probability: float
    memory: Payload


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
    traffic = Traffic()
    gather = _buffered if config.buffer else _synchronous
    gathered = gather(federation, state, held, round, network, on_reply, traffic, memory or {})
    keeps = strategies.traits(strategy).keeps or config.uplink.needs_differences
    known = dict(held)
    defence = _defence(federation, round, memory or {})
    aggregator: Aggregator = defence or strategy.aggregator()
    examples: dict[str, int] = {}
    metrics: dict[str, Metrics] = {}
    dropped: dict[str, str] = {}
    staleness: list[int] = []
    for answer in gathered.answers:
        client, reply = answer.client, answer.reply
        if reply is None:
            dropped[client] = answer.why
            if left := accepted_only(known, client):
                known[client] = left
            else:
                known.pop(client, None)
            continue
        staleness.append(round - answer.round)
        weight = buffer.weight(reply.num_examples, staleness[-1], config.staleness_power)
        aggregator.add(answer.update, weight)
        examples[client], metrics[client] = reply.num_examples, reply.metrics
        accepted = {accepted_note(answer.round)} if keeps else set()
        known[client] = answer.content | accepted
    _require_quorum(config, round, gathered.wanted, len(examples), dropped)
    try:
        aggregate = aggregator.finalise()
    except ValueError as error:
        raise RoundError(f"round {round}: {error}") from error
    after, applied = strategy.apply(state, aggregate)
    if not all(tree.finite(params) for params in after.values()):
        raise RoundError(f"round {round}: the aggregate is not finite: lower lr")
    return RoundResult(
        state=after,
        held=known,
        metrics={
            **_mean(metrics, examples),
            **applied,
            **_staleness(config, staleness),
            **(defence.metrics if defence else {}),
        },
        num_examples=examples,
        client_loss={c: m["train_loss"] for c, m in metrics.items() if "train_loss" in m},
        dropped=dropped,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        framing_up=traffic.framing_up,
        framing_down=traffic.framing_down,
        cost=formula(costs(federation, state, round, list(examples))),
        sampling_probability=gathered.probability,
        sim_seconds=_sim_seconds(config, traffic, examples, dropped),
        memory={
            **gathered.memory,
            **(_norms(federation, round, defence, memory or {}) if defence else {}),
        },
    )


def _require_quorum(
    config: RunConfig, round: int, wanted: int, valid: int, dropped: Mapping[str, str]
) -> None:
    """Raises RoundError when fewer updates are valid than the quorum, or a robust rule, needs."""
    needed = math.ceil(config.quorum * wanted)
    if config.robust != "none":
        hostile = robust.hostile(valid, config.byzantine)
        needed = max(needed, robust.least(config.robust, hostile))
    if valid >= needed:
        return
    # Who diverged says more than who was silent.
    told = sorted(dropped.items(), key=lambda item: "lower lr" not in item[1])
    client, why = next(iter(told), ("", "none was asked"))
    raise RoundError(
        f"round {round}: {valid} of {wanted} clients gave a valid update, {needed} are needed; "
        f"{client}: {why}"
    )


def _defence(federation: Federation, round: int, memory: Payload) -> Robust | None:
    """What stands before the strategy's aggregator, with the norms of earlier rounds like this."""
    config = federation.config
    if config.robust == "none":
        return None
    kept = memory.get(_NORMS, {}).get(_phase(federation, round))
    history = () if kept is None else kept.tolist()
    space = config.compared_in(federation.strategy)
    make = federation.strategy.aggregator
    return Robust(config.robust, make, space, config.byzantine, history)


def _norms(federation: Federation, round: int, defence: Robust, memory: Payload) -> Payload:
    own = {_phase(federation, round): torch.tensor(defence.history)}
    return {_NORMS: {**memory.get(_NORMS, {}), **own}}


def _phase(federation: Federation, round: int) -> str:
    """A name for the tensors that this round's updates have: other ones are of another size."""
    client = next(iter(federation.clients))
    fresh = federation.fresh(federation.lora(client))
    like = federation.strategy.update_like(fresh, federation.size(client, round))
    names = [f"{group}/{name}" for group in sorted(like) for name in sorted(like[group])]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def evaluate_clients(
    federation: Federation, state: Payload, held: Held, round: int, network: Network
) -> dict[str, Metrics]:
    """The global model's scores on up to `eval_clients` clients' own held-out examples."""
    members = federation.evaluated
    if not members:
        return {}
    traffic = Traffic()
    tasks = make_tasks(federation, state, held, round, Kind.EVALUATE, members, traffic)
    packets = _packets(federation, state, tasks, held, network, lambda client: None, traffic)
    answers = (_answer(federation, tasks[c], c, packet, traffic) for c, packet in packets)
    return {
        answer.client: {**answer.reply.metrics, "examples": answer.reply.num_examples}
        for answer in answers
        if answer.reply is not None and "loss" in answer.reply.metrics
    }


def _synchronous(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    network: Network,
    on_reply: Callable[[str], None],
    traffic: Traffic,
    memory: Payload,
) -> _Gathering:
    """All answers of a new cohort, each as soon as it can be folded in."""
    present = federation.present(round)
    members = federation.sample(present, federation.cohort_size, round)
    if not members:
        raise _nobody(federation, round)
    tasks = make_tasks(federation, state, held, round, Kind.TRAIN, members, traffic)
    packets = _packets(federation, state, tasks, held, network, on_reply, traffic)
    answers = (_answer(federation, tasks[c], c, packet, traffic) for c, packet in packets)
    return _Gathering(answers, len(members), len(members) / len(present), memory)


def _buffered(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    network: Network,
    on_reply: Callable[[str], None],
    traffic: Traffic,
    memory: Payload,
) -> _Gathering:
    """The first valid updates that arrive in simulated time, as many as the buffer holds.

    Places of the cohort that are free are filled with clients that start from `state`: at first
    those of the last round's updates, then those of clients that give none.
    """
    wanted = federation.config.buffer or 0
    began, flights = buffer.recall(memory)
    now, landed, valid, draw = began, list[Answer](), 0, 0
    while valid < wanted:
        busy = {flight.client for flight in flights} | {answer.client for answer in landed}
        free = federation.cohort_size - len(flights) - valid
        others = [client for client in federation.present(round) if client not in busy]
        if members := federation.sample(others, free, round, draw):
            tasks = make_tasks(federation, state, held, round, Kind.TRAIN, members, traffic)
            packets = _packets(federation, state, tasks, held, network, on_reply, traffic)
            flights += [_flight(federation, tasks[c], c, p, now, traffic) for c, p in packets]
            draw += 1
        if not flights:
            break
        flight = min(flights, key=lambda flight: (flight.arrival, flight.client))
        flights.remove(flight)
        task = Task(federation.run_id, flight.round, flight.base_version, Kind.TRAIN, "")
        answer = _answer(federation, task, flight.client, flight.packet, traffic)
        landed.append(replace(answer, content=flight.content))
        now = flight.arrival
        traffic.took[flight.client] = now - began
        valid += answer.reply is not None
    if not landed:
        raise _nobody(federation, round)
    return _Gathering(
        sorted(landed, key=lambda answer: answer.client),
        wanted,
        federation.cohort_size / len(federation.clients),
        {**memory, **buffer.remember(now, flights)},
    )


def _flight(
    federation: Federation,
    task: Task,
    client: str,
    packet: Packet | None,
    now: float,
    traffic: Traffic,
) -> Flight:
    """A reply that is known already and arrives when its time has come; it is read then."""
    trial = Traffic(sent=traffic.sent)
    answer = _answer(federation, task, client, packet, trial)
    took = trial.took.get(client, federation.seconds(client, traffic.sent[client], 0))
    return Flight(client, task.round, task.base_version, answer.content, now + took, packet)


def _nobody(federation: Federation, round: int) -> RoundError:
    return RoundError(
        f"round {round}: none of {len(federation.clients)} clients can be reached: see "
        f"{federation.config.availability}"
    )


def _packets(
    federation: Federation,
    state: Payload,
    tasks: Mapping[str, Task],
    held: Held,
    network: Network,
    on_reply: Callable[[str], None],
    traffic: Traffic,
) -> Iterator[tuple[str, Packet | None]]:
    """What each client answers, in the order of `tasks`; None for no answer.

    A client that has lost cached groups is asked once more, with everything: a device may forget.
    """
    packets = {client: pack_task(task) for client, task in tasks.items()}
    for client, packet in in_order(_ask(federation, tasks, packets, network), list(tasks)):
        task, answer = tasks[client], packet
        if packet is not None and _forgot(packet):
            traffic.framing_up += len(packet.header)
            forgot = {client: accepted_only(held, client)}
            full = make_tasks(federation, state, forgot, task.round, task.kind, [client], traffic)
            again = in_order(network.ask({client: pack_task(full[client])}), [client])
            answer = next(again)[1]
        on_reply(client)
        yield client, answer


def _ask(
    federation: Federation,
    tasks: Mapping[str, Task],
    packets: Mapping[str, Packet],
    network: Network,
) -> Iterator[tuple[str, Packet | None]]:
    """As Network.ask; clients that are simulated to be silent are not asked to train."""
    asked = dict(packets)
    for client, task in tasks.items():
        name = federation.class_of(client)
        if task.kind == Kind.TRAIN and clock.silent(federation.config, name, client, task.round):
            del asked[client]
            yield client, None
    yield from network.ask(asked)


def _forgot(packet: Packet) -> bool:
    """Whether a reply says that cached groups are missing; it has no payload then."""
    try:
        return bool(unpack_reply(packet, 0).missing)
    except WireError:
        return False


def _answer(
    federation: Federation, task: Task, client: str, packet: Packet | None, traffic: Traffic
) -> Answer:
    """An answer that is read and checked; counts its bytes."""
    content = frozenset([*task.cached.values(), *([task.log.version] if task.log else [])])
    try:
        reply, update = _checked(federation, client, task, packet, traffic)
        if reply.error or reply.missing:
            raise WireError(reply.error or "cached groups are missing")
        return Answer(client, task.round, content, reply, update, "")
    except WireError as error:
        return Answer(client, task.round, content, None, {}, str(error))


def _checked(
    federation: Federation, client: str, task: Task, packet: Packet | None, traffic: Traffic
) -> tuple[Reply, Payload]:
    """A reply that passed all checks; counts its bytes. Raises WireError."""
    if packet is None:
        raise WireError("no answer")
    like = None
    if task.kind == Kind.TRAIN:
        fresh = federation.fresh(federation.lora(client))
        like = federation.strategy.update_like(fresh, federation.size(client, task.round))
    reply, update = read_reply(packet, client, task, like, federation.config.uplink)
    if reply.num_examples > federation.most_examples(client) and not reply.error:
        raise WireError(f"reply claims {reply.num_examples} examples, more than it can have")
    content = wire.content_bytes(wire.content(reply)) if update else 0
    if task.kind == Kind.TRAIN and federation.config.simulates_time:
        took = federation.seconds(client, traffic.sent.get(client, 0), content)
        deadline = federation.config.deadline_simulated
        if deadline and took > deadline:
            raise WireError(f"late: {took:.4g} simulated seconds, the deadline is {deadline:g}")
        traffic.took[client] = took
    traffic.up += content
    traffic.framing_up += len(packet.header) + len(packet.payload) - content
    return reply, update


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


def _staleness(config: RunConfig, found: Sequence[int]) -> Metrics:
    """How many steps of the server updates were behind, where they can be."""
    if not config.buffer:
        return {}
    return {"staleness": sum(found) / len(found), "staleness_max": float(max(found))}


def _sim_seconds(
    config: RunConfig, traffic: Traffic, examples: Mapping[str, int], dropped: Mapping[str, str]
) -> float | None:
    """Simulated seconds of a round; None where time is not simulated."""
    if not config.simulates_time:
        return None
    taken = [traffic.took[client] for client in examples]
    return clock.round_seconds(config, taken, missing=bool(dropped))
