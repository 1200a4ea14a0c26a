"""The clients of a run behind a Flower Grid: who they are, who is online, how they are asked."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from corolla.errors import RoundError, StoppedError, WireError
from corolla.host import logs
from corolla.server.deployment.calls import POLL, Calls, addressed
from corolla.server.deployment.limits import Admission, Limits
from corolla.server.deployment.names import Names
from corolla.wire import messages as wire
from corolla.wire.messages import Kind, Reply, Task, pack_reply, pack_task, unpack_task
from corolla.wire.packet import Packet, from_flower
from corolla.wire.task_settings import RunSettings

SETTLE = 2.0
"""Seconds without a new node after which those that are there are the federation."""
_LARGEST = 1 << 40
HELLO = 120.0
"""Seconds in which a node must say who it is; a device loads its model first."""
REPEAT = 10.0
"""Seconds after which a hello is said again while there is no answer, doubled each time: Flower may
lose one, as when the ServerApp of before was killed."""
_FIRST_HELLO = 600.0
"""The same where no node joins later: one that says nothing ends the run. The workers of Flower's
engine import everything, all at once, before one of them answers."""
_AGAIN = 60.0
"""Seconds after which a node that did not say so is asked again, doubled up to 16 times this."""
_SEATS = 300.0
"""Seconds after which a gateway is asked again: its phones come and go, and its seats with them."""

_LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
"""Codes by which a SuperLink says that it has no answer, and not that a node has failed."""

_log = logs.logger("grid")


@dataclass
class _Greeting:
    """A node that is asked who it is: until when it may answer, and when it is asked again."""

    until: float
    again: float
    pause: float
    messages: set[str] = field(default_factory=set)


class GridNetwork:
    """Nodes behind a Flower Grid, asked in our own loop: it has a deadline, no reply can end it.

    A node is known by its key, a client by its name: a member's name is that of its registered key
    (`admission.members`), another that of the first key that uses it (`admission.names`). A
    SuperLink that is away costs a round, not a run.
    """

    def __init__(
        self,
        grid: Grid,
        hello: Task,
        deadline: float,
        stop: threading.Event,
        admission: Admission,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hello` asks a node who it is; `deadline`: seconds that a round may take."""
        self.grid, self.hello, self.deadline, self.stop = grid, hello, deadline, stop
        self._clock = clock
        self._least, self._nodes = admission.clients, admission.nodes
        self._wait = deadline if admission.wait is None else admission.wait
        self._hello = HELLO if admission.clients else _FIRST_HELLO
        self._repeat = REPEAT if admission.clients else math.inf
        self._limits, self._deployed = admission.limits or Limits(), admission.names is not None
        self._calls = Calls(grid, stop, admission.limits, clock)
        self._names = Names(admission.names, admission.members)
        self._keys: dict[int, bytes] = {}  # of every node that was ever online
        self._members: dict[str, tuple[int, int, int]] = {}  # name → node, examples, seats
        self._greeted: dict[int, _Greeting] = {}  # those that have not answered yet
        self._again: dict[int, tuple[float, float]] = {}  # node → when to ask again, pause
        self._reasons: dict[int, str] = {}
        self._begun = False

    def clients(self) -> Mapping[str, int]:
        """Everyone that is known. At first waits until enough are.

        Raises RoundError when they are too few, StoppedError when they were waited for.
        """
        deadline = self._clock() + self._wait
        while not self._begun:
            online = len(self._greet())
            all_said = not self._greeted and online >= max(1, self._nodes)
            if all_said and len(self._members) >= max(1, self._least):
                self._begun = True
            elif self._clock() > deadline or (all_said and not self._least):
                raise (StoppedError if self._least else RoundError)(self._too_few(online))
            else:
                self._calls.pause()
        return {name: examples for name, (_, examples, _) in self._members.items()}

    def online(self) -> AbstractSet[str]:
        """Clients that can be asked now. Nodes that are new, or back with another id, are greeted;
        their answers are read at the next call.
        """
        if self.stop.is_set():
            raise StoppedError("stopped")
        nodes = self._greet()
        return {name for name, (node, _, _) in self._members.items() if node in nodes}

    def seats(self) -> Mapping[str, int]:
        return {name: seats for name, (_, _, seats) in self._members.items() if seats}

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        known = {c: p for c, p in packets.items() if c in self._members}
        yield from ((client, None) for client in packets if client not in known)
        clients = {self._members[client][0]: client for client in known}
        asked = {self._members[client][0]: packet for client, packet in known.items()}
        yield from self._exchange(clients, asked)

    def _exchange(
        self, clients: Mapping[int, str], packets: Mapping[int, Packet]
    ) -> Iterator[tuple[str, Packet | None]]:
        """Send to nodes, yield (client, reply) as they come until all have or time is over.

        Flower's own failures become error replies, as what is no packet does.
        """
        deadline = self._clock() + self.deadline
        messages = {node: addressed(node, packets[node], self.deadline) for node in packets}
        sent = self._calls.push(list(messages.values()), deadline) if messages else set()
        waiting: dict[str, int] = {}
        for node, message in messages.items():
            if message.metadata.message_id in sent:
                waiting[message.metadata.message_id] = node
            else:
                yield clients[node], None
        while waiting and self._clock() < deadline:
            self._turn_out()
            gone = [
                sent_id for sent_id, node in waiting.items() if clients[node] not in self._members
            ]
            yield from ((clients[waiting.pop(sent_id)], None) for sent_id in gone)
            for sent_id, found in self._calls.pull({m: self._seats(n) for m, n in waiting.items()}):
                self._turn_out()  # of others, before it came: many and large replies take a while
                answered = waiting.pop(sent_id)
                if clients[answered] not in self._members:
                    yield clients[answered], None
                    continue
                yield clients[answered], _packet(found, packets[answered], clients[answered])
            if waiting:
                self._calls.pause()
        yield from ((clients[node], None) for node in waiting.values())

    def _greet(self) -> set[int]:
        """Ask nodes that are not known who they are, read what has come; the nodes online."""
        now = self._clock()
        keys = self._calls.nodes()
        self._keys.update(keys)
        self._turn_out()
        # Of a gateway, what it has said is old after a while.
        known = {node for node, _, seats in self._members.values() if not seats}
        for node in sorted(keys.keys() - known - self._greeted.keys()):
            if now >= self._again.get(node, (0, 0))[0]:
                self._greeted[node] = _Greeting(now + self._hello, now, self._repeat)
        self._say_hello([n for n in sorted(keys) if n in self._greeted], now)
        waiting = {m: node for node, own in self._greeted.items() for m in own.messages}
        for sent_id, found in self._calls.pull({m: self._seats(n) for m, n in waiting.items()}):
            node = waiting[sent_id]
            if node not in self._greeted:  # it has answered another one
                continue
            if isinstance(found, Message) and found.has_error() and found.error.code in _LOST:
                self._greeted[node].messages.discard(sent_id)
                continue
            del self._greeted[node]
            self._learn(node, _packet(found, pack_task(self.hello), ""), keys.keys())
        for late in [node for node, own in self._greeted.items() if now > own.until]:
            del self._greeted[late]
            self._refuse(late, "no answer to hello")
        return set(keys)

    def _say_hello(self, nodes: list[int], now: float) -> None:
        """To those of the nodes whose time it is. Who cannot be sent it is as if never greeted."""
        due = {node: self._greeted[node] for node in nodes if now >= self._greeted[node].again}
        hello = pack_task(self.hello)
        messages = {n: addressed(n, hello, own.until - now) for n, own in due.items()}
        sent = self._calls.push(list(messages.values()), now) if messages else set()
        for node, own in due.items():
            if (told := messages[node].metadata.message_id) in sent:
                own.messages.add(told)
                own.again, own.pause = now + own.pause, 2 * own.pause
            elif not own.messages:
                del self._greeted[node]

    def _learn(self, node: int, packet: Packet, online: AbstractSet[int]) -> None:
        try:
            reply = wire.unpack_reply(packet, 0)
        except WireError as error:
            return self._refuse(node, str(error))
        name = reply.client
        if reply.error or not name:
            return self._refuse(node, reply.error or "it has no name")
        if why := self._limits.refuse(reply, deployed=self._deployed):
            return self._refuse(node, why)
        if any(own == node and known != name for known, (own, _, _) in self._members.items()):
            return self._refuse(node, f"it has another name now, {name!r}")
        other, key = self._members.get(name), self._keys.get(node, b"")
        if why := self._names.refuse(name, key):
            return self._turn_away(node, why)
        if other and other[0] != node and other[0] in online:
            why = f"two nodes say they are client {name!r}"
            itself = self._keys.get(other[0]) == key  # it is back sooner than Flower knows
            return self._refuse(node, why) if itself else self._turn_away(node, why)
        self._names.keep(name, key)
        found = node, reply.num_examples, min(reply.seats, self._limits.seats)
        if found != other:
            _log.info("joined", client=name, examples=found[1], seats=found[2])
        self._members[name] = found
        self._again.pop(node, None)
        self._reasons.pop(node, None)
        if reply.seats:
            self._again[node] = (self._clock() + _SEATS, _AGAIN / 2)
        return None

    def _turn_out(self) -> None:
        """Takes clients out whose names are not theirs any more, where the members have changed.

        Nodes that were refused are asked again at once: what they were refused for may be mended.
        """
        if not self._names.changed():
            return
        for node in self._reasons:
            self._again.pop(node, None)
        for name, (node, _, _) in list(self._members.items()):
            if why := self._names.refuse(name, self._keys.get(node, b"")):
                del self._members[name]
                self._turn_away(node, why)

    def _turn_away(self, node: int, why: str) -> None:
        """Leave a node out, and tell it: its owner can do something about it."""
        self._refuse(node, why)
        told = pack_task(replace(self.hello, refusal=why))
        self._calls.push([addressed(node, told, self._hello)], self._clock())

    def _refuse(self, node: int, why: str) -> None:
        pause = min(2 * self._again.get(node, (0.0, _AGAIN / 2))[1], 16 * _AGAIN)
        self._again[node] = (self._clock() + pause, pause)
        if self._seats(node):  # a gateway that is busy, or has no phones now: it keeps its place
            return
        if self._reasons.get(node) != why:
            _log.warning("left out", node=str(node), why=why)
        self._reasons[node] = why

    def _too_few(self, online: int) -> str:
        why = "".join(f"; one says: {reason}" for reason in list(self._reasons.values())[:1])
        needed = f"{self._least} clients" if self._least else f"{self._nodes} nodes"
        return f"{online} nodes are online, {len(self._members)} as clients; needed: {needed}{why}"

    def _seats(self, node: int) -> int:
        return next((seats for own, _, seats in self._members.values() if own == node), 0)


def count_nodes(grid: Grid, stop: threading.Event, wait: float) -> int:
    """How many nodes are there once none has come for SETTLE seconds. Raises RoundError."""
    found, since = 0, time.monotonic()
    deadline = since + wait
    while time.monotonic() < deadline:
        if (now := len(list(grid.get_node_ids()))) != found:
            found, since = now, time.monotonic()
        if found and time.monotonic() - since > SETTLE:
            return found
        if stop.wait(POLL):
            raise StoppedError("stopped")
    raise RoundError("no node has come")


def _packet(message: Message | WireError, asked: Packet, client: str) -> Packet:
    """The packet of a reply; what is no packet becomes an error reply to the task it answers."""
    try:
        if isinstance(message, WireError):
            raise message
        if not message.has_error():
            return from_flower(message.content, _LARGEST)
        lines = (message.error.reason or "").strip().splitlines() or ["no reason given"]
        reason = f"Flower error {message.error.code}: {lines[-1]}"
    except WireError as error:
        reason = str(error)
    task = unpack_task(asked)
    return pack_reply(
        Reply(task.run_id, task.round, task.base_version, task.kind, client, error=reason)
    )


def hello(run_id: str, settings: RunSettings, model_sha256: str = "") -> Task:
    """The task that asks a node who it is."""
    return Task(run_id, 0, "", Kind.HELLO, settings.to_json(), model_sha256=model_sha256)
