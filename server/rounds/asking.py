"""The asking of members in a round, and their answers: read, timed, and passed by the gate."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from corolla.errors import RoundError, WireError
from corolla.server.rounds import buffer, expectations, simulated_time
from corolla.server.rounds.buffer import Flight
from corolla.server.rounds.call import Plan, RoundCall, RoundEvents
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.gate import judge
from corolla.server.rounds.network import Network
from corolla.server.rounds.ordering import in_order
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.tasks import Traffic, accepted_only, make_tasks
from corolla.server.rounds.verdicts import Code, Expected, Judged, Verdict
from corolla.tensors import tree
from corolla.types import Payload
from corolla.wire.messages import Kind, Task, pack_task, unpack_reply
from corolla.wire.packet import Packet


@dataclass(frozen=True)
class Answer:
    """The answer to one task, judged. `content` are the ids that its member now holds."""

    task: Task
    client: str
    content: frozenset[str]
    expected: Expected
    judged: Judged


@dataclass(frozen=True)
class Gathering:
    """The answers a round is made of, at best `wanted` valid updates, and the server's memory."""

    answers: Iterable[Answer]
    wanted: int
    probability: float
    memory: Payload


@dataclass(frozen=True)
class Asking:
    """The objects that are needed to ask members in a round."""

    call: RoundCall
    network: Network
    spending: Spending
    events: RoundEvents = field(default_factory=RoundEvents)
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def federation(self) -> Federation:
        """The federation whose members are asked."""
        return self.call.federation

    def __call__(
        self,
        members: Mapping[str, int],
        kind: Kind = Kind.TRAIN,
        cohort: Mapping[str, int] | None = None,
    ) -> Iterator[tuple[Task, str, Packet | None]]:
        """Yields the answer of each member, in the order of `members`; sends nothing before `next`.

        They are all of a cohort, or those of `cohort` that can be asked.
        """
        call = self.call
        tasks = self.tasks(call.held, kind, members)
        if kind == Kind.TRAIN:
            drawn, seed = members if cohort is None else cohort, call.federation.config.seed
            versions = {task.base_version for task in tasks.values()}
            version = next(iter(versions or [tree.digest_all(call.state)]))
            self.events.on_plan(Plan(call.number, call.attempt, drawn, version, seed))
        if not tasks:
            return
        for client, packet in _packets(self, tasks):
            self.events.on_reply(client)
            yield tasks[client], client, packet

    def tasks(self, held: Held, kind: Kind, members: Mapping[str, int]) -> dict[str, Task]:
        """The task of each member, where members hold what `held` says; counts their bytes."""
        call = self.call
        return make_tasks(
            call.federation, call.state, held, call.number, kind, members, self.traffic
        )


def gather(asking: Asking) -> Gathering:
    """The answers of a round, as the config has updates gathered."""
    return _buffered(asking) if asking.federation.config.buffer else _synchronous(asking)


def _synchronous(asking: Asking) -> Gathering:
    """All answers of a new cohort, each as soon as it can be folded in."""
    federation, round, spending = asking.federation, asking.call.number, asking.spending
    present = federation.present(round, asking.network.online())
    cohort = asking.call.cohort
    if cohort is None:
        cohort = spending.draw(federation, present, round, asking.call.attempt)
    if strangers := cohort.keys() - federation.clients.keys():
        raise RoundError(
            f"round {round}: {min(strangers)!r} of its cohort is not in the federation"
        )
    able = set(spending.able(federation, cohort, round))  # without whom a kill has cost its turn
    if spending.poisson:
        able &= set(present)
    members = {member: number for member, number in cohort.items() if member in able}
    if cohort and not members and not spending.poisson:
        raise RoundError(f"round {round}: nobody of its cohort may take part once more")
    if not members and not spending.poisson:
        raise _nobody(federation, round)
    wanted, seats = sum(members.values()), sum(map(federation.room, present))
    answers = (answer_of(asking, *answer) for answer in asking(members, cohort=cohort))
    chance = spending.probability or wanted / max(wanted, seats)
    return Gathering(answers, wanted, chance, asking.call.memory)


def _buffered(asking: Asking) -> Gathering:
    """The first valid updates that arrive in simulated time, as many as the buffer holds.

    Places of the cohort that are free are filled with clients that start from the state: at first
    those of the last round's updates, then those of clients that give none.
    """
    federation, round, traffic = asking.federation, asking.call.number, asking.traffic
    wanted = federation.config.buffer or 0
    began, flights = buffer.recall(asking.call.memory)
    now, landed, valid, draw = began, list[Answer](), 0, asking.call.attempt << 16
    while valid < wanted:
        busy = {flight.client for flight in flights} | {answer.client for answer in landed}
        free = federation.cohort_size - len(flights) - valid
        there = asking.spending.able(federation, federation.present(round), round)
        others = [client for client in there if client not in busy]
        if members := federation.sample(others, free, round, draw):
            flights += [_flight(asking, *answer, now) for answer in asking(members)]
            draw += 1
        if not flights:
            break
        flight = min(flights, key=lambda flight: (flight.arrival, flight.client))
        flights.remove(flight)
        task = Task(federation.run_id, flight.round, flight.base_version, Kind.TRAIN, "")
        answer = answer_of(asking, task, flight.client, flight.packet)
        landed.append(replace(answer, content=flight.content))
        now = flight.arrival
        traffic.took[flight.client] = now - began
        valid += answer.judged.verdict.accepted
    if not landed:
        raise _nobody(federation, round)
    return Gathering(
        sorted(landed, key=lambda answer: answer.client),
        wanted,
        federation.cohort_size / len(federation.clients),
        {**asking.call.memory, **buffer.remember(now, flights)},
    )


def _flight(asking: Asking, task: Task, client: str, packet: Packet | None, now: float) -> Flight:
    """A reply that is known already and arrives when its time has come; it is read then."""
    sent = asking.traffic.sent
    trial = replace(asking, traffic=Traffic(sent=sent))
    answer = answer_of(trial, task, client, packet)
    took = trial.traffic.took.get(client, asking.federation.seconds(client, sent[client], 0))
    return Flight(client, task.round, task.base_version, answer.content, now + took, packet)


def _nobody(federation: Federation, round: int) -> RoundError:
    availability = federation.config.availability
    return RoundError(
        f"round {round}: none of {len(federation.clients)} clients can be reached"
        + (f": see {availability}" if availability else "")
    )


def _packets(asking: Asking, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Packet | None]]:
    """Yields the answer of each member, in the order of `tasks`; None for no answer.

    Clients that have lost cached groups are asked once more, with everything, when all others have
    answered: a device may forget, and however many say so, a round takes two deadlines at most.
    """
    yield from in_order(_answers(asking, tasks), list(tasks))


def _answers(asking: Asking, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Packet | None]]:
    """As Network.ask, without strangers and second answers."""
    packets = {client: pack_task(task) for client, task in tasks.items()}
    waiting, forgot = set(tasks), dict[str, int]()
    for client, packet in _ask(asking.federation, tasks, packets, asking.network):
        if client not in waiting:
            continue
        waiting.remove(client)
        if packet is not None and _forgot(packet):
            asking.traffic.framing_up += len(packet.header)
            forgot[client] = tasks[client].seats
        else:
            yield client, packet
    if forgot:
        held = {client: accepted_only(asking.call.held, client) for client in forgot}
        full = asking.tasks(held, tasks[next(iter(forgot))].kind, forgot)
        yield from asking.network.ask({client: pack_task(task) for client, task in full.items()})


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
        if task.kind == Kind.TRAIN and simulated_time.silent(
            federation.config, name, client, task.round
        ):
            del asked[client]
            yield client, None
    yield from network.ask(asked)


def _forgot(packet: Packet) -> bool:
    """Returns whether a reply says that cached groups are missing; it has no payload then."""
    try:
        return bool(unpack_reply(packet, 0).missing)
    except WireError:
        return False


def answer_of(asking: Asking, task: Task, client: str, packet: Packet | None) -> Answer:
    """An answer that has passed the gate, or not; counts its bytes and its simulated time."""
    federation, traffic = asking.federation, asking.traffic
    content = frozenset([*task.cached.values(), *([task.log.version] if task.log else [])])
    expect = expectations.expected(federation, client, task.kind, task.round, task.seats)
    judged = judge(packet, client, task, expect)
    if packet is not None and judged.verdict.accepted and _late(asking, task, client, judged):
        took, deadline = traffic.took.pop(client), federation.config.deadline_simulated
        why = f"late: {took:.4g} simulated seconds, the deadline is {deadline:g}"
        judged = Judged(Verdict(Code.LATE, why))
    if packet is not None and judged.verdict.code in (Code.ACCEPTED, Code.CLIENT_ERROR):
        traffic.up += judged.content
        traffic.framing_up += len(packet.header) + len(packet.payload) - judged.content
    return Answer(task, client, content, expect, judged)


def _late(asking: Asking, task: Task, client: str, judged: Judged) -> bool:
    """Returns whether a reply comes after the simulated deadline; notes when it comes."""
    federation, traffic = asking.federation, asking.traffic
    if task.kind != Kind.TRAIN or not federation.config.simulates_time:
        return False
    took = federation.seconds(client, traffic.sent.get(client, 0), judged.content)
    traffic.took[client] = took
    deadline = federation.config.deadline_simulated
    return deadline is not None and took > deadline
