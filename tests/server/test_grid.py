"""Clients behind a Grid: names and keys, deadlines, a SuperLink that goes away and comes back.

The Grid is one of this process, with nodes that are functions; Flower's own is in tests/e2e.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from corolla import logs
from corolla.errors import RoundError, StoppedError
from corolla.packet import Packet, from_flower, to_flower
from corolla.server import grid as module
from corolla.server.grid import GridNetwork, hello
from corolla.wire import Kind, Reply, Task, pack_reply, pack_task, unpack_reply, unpack_task

RUN = "5f" * 16
TASK = pack_task(Task(RUN, 1, "v", Kind.TRAIN, "{}"))


@dataclass
class Node:
    """A client of a name; `silent`: it never answers; `fails`: Flower says so in its place."""

    name: str
    key: str
    online: bool = True
    silent: bool = False
    fails: str = ""
    seats: int = 0
    asked: list[Kind] = field(default_factory=list)


class LocalGrid(Grid):
    """Answers at the next pull. `away` is how many calls will fail, as of a SuperLink that died."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes, self.away, self.lost = nodes, 0, 0
        self.sent: dict[str, Message] = {}
        self.refused: set[int] = set()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        self._call()
        return [node for node, found in self.nodes.items() if found.online]

    def get_nodes(self) -> Iterable[NodeInfo]:
        ids = list(self.get_node_ids())
        return [NodeInfo(node_id=n, public_key=self.nodes[n].key.encode()) for n in ids]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._call()
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            known = message.object_id in self.sent
            self.sent[message.object_id] = message
            refused = message.metadata.dst_node_id in self.refused
            ids.append("" if known or refused else message.object_id)
        if self.lost:  # taken, but the answer is lost
            self.lost -= 1
            raise httpx.ReadError("lost")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._call()
        return list(self._answers(list(message_ids)))

    def _answers(self, ids: list[str]) -> Iterator[Message]:
        for sent in ids:
            message = self.sent.get(sent)
            node = self.nodes[message.metadata.dst_node_id] if message else None
            if message is None or node is None or node.silent or not node.online:
                continue
            del self.sent[sent]
            task = unpack_task(from_flower(message.content, 1 << 20))
            node.asked.append(task.kind)
            if node.fails:
                yield Message(Error(2, node.fails), reply_to=message)
                continue
            reply = Reply(
                task.run_id,
                task.round,
                task.base_version,
                task.kind,
                node.name,
                num_examples=10,
                seats=node.seats,
            )
            yield Message(to_flower(pack_reply(reply)), reply_to=message)

    def _call(self) -> None:
        if self.away:
            self.away -= 1
            raise httpx.ConnectError("away")


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can only be made inside a task of Flower; waits are short."""
    for name, value in {"_run_id": 1, "_task_id": 1, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    monkeypatch.setattr(module, "POLL", 0.02)
    monkeypatch.setattr(module, "AWAY", 0.02)


Make = Callable[..., GridNetwork]


def network(grid: Grid, **options: Any) -> GridNetwork:
    stop = options.pop("stop", threading.Event())
    return GridNetwork(grid, hello(RUN, {}), options.pop("deadline", 5.0), stop, **options)


def test_clients_are_asked_by_name_and_answer_in_any_order() -> None:
    grid = LocalGrid({7: Node("b", "k7"), 3: Node("a", "k3"), 5: Node("gate", "k5", seats=8)})
    net = network(grid, nodes=3)
    assert net.clients() == {"a": 10, "b": 10, "gate": 10}
    assert net.seats() == {"gate": 8}
    assert net.online() == {"a", "b", "gate"}
    answers = dict(net.ask({"b": TASK, "a": TASK}))
    assert {c: unpack_reply(p, 0).client for c, p in answers.items() if p} == {"a": "a", "b": "b"}
    assert grid.nodes[5].asked == [Kind.HELLO]
    assert grid.nodes[3].asked == [Kind.HELLO, Kind.TRAIN]
    net.online()
    assert grid.nodes[3].asked == [Kind.HELLO, Kind.TRAIN]  # it is known


def test_messages_live_as_long_as_a_round() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, deadline=0.6)
    net.clients()
    grid.nodes[1].silent = True
    began = time.monotonic()
    assert list(net.ask({"a": TASK})) == [("a", None)]
    assert 0.5 < time.monotonic() - began < 3
    (left,) = grid.sent.values()
    assert left.metadata.ttl == 0.6


def test_a_name_belongs_to_the_first_key_that_used_it_for_the_whole_run(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    thief = Node("a", "other key")
    grid = LocalGrid({1: Node("a", "key"), 2: Node("b", "b's")})
    assert network(grid, nodes=2, names=names).clients() == {"a": 10, "b": 10}
    # The run goes on in another process; the owner of the name is away.
    grid = LocalGrid({2: Node("b", "b's"), 3: thief})
    net = network(grid, clients=1, names=names)
    assert net.clients() == {"b": 10}
    assert net.online() == {"b"}
    grid.nodes[4] = Node("a", "key")
    until(lambda: net.online() == {"a", "b"})
    assert dict(net.ask({"a": TASK}))["a"] is not None
    assert grid.nodes[4].asked[-1] == Kind.TRAIN
    assert Kind.TRAIN not in thief.asked


def test_two_nodes_of_one_name_at_once_are_one_client(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    logs.configure(log)
    try:
        grid = LocalGrid({1: Node("a", "one"), 2: Node("a", "two")})
        net = network(grid, nodes=2, names=tmp_path / "names.json")
        assert net.clients() == {"a": 10}
        assert len(dict(net.ask({"a": TASK}))) == 1
    finally:
        logs.unconfigure()
    assert "two nodes say they are client 'a'" in log.read_text()
    assert [node.asked for node in grid.nodes.values()].count([Kind.HELLO, Kind.TRAIN]) == 1


def test_a_node_that_comes_back_with_another_id_is_found_again() -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, nodes=2)
    net.clients()
    grid.nodes[1].online = False
    grid.nodes[9] = Node("a", "k")
    until(lambda: net.online() == {"a", "b"})
    assert dict(net.ask({"a": TASK}))["a"] is not None
    assert grid.nodes[9].asked == [Kind.HELLO, Kind.TRAIN]


def test_who_is_offline_or_refused_gives_no_answer_at_once() -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, nodes=2)
    net.clients()
    grid.nodes[1].online = False
    assert net.online() == {"b"}
    grid.refused = {2}
    began = time.monotonic()
    assert dict(net.ask({"b": TASK, "stranger": TASK})) == {"b": None, "stranger": None}
    assert time.monotonic() - began < 2


def test_a_superlink_that_is_away_for_a_while_costs_time_and_nothing_else() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    grid.away = 3
    net = network(grid)
    assert net.clients() == {"a": 10}
    grid.away = 3
    assert dict(net.ask({"a": TASK}))["a"] is not None
    answers = net.ask({"a": TASK})
    grid.nodes[1].silent = True
    threading.Timer(0.1, lambda: setattr(grid, "away", 3)).start()
    threading.Timer(0.2, lambda: setattr(grid.nodes[1], "silent", False)).start()
    assert dict(answers)["a"] is not None


def test_a_message_whose_receipt_is_lost_is_still_waited_for() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid)
    net.clients()
    grid.lost = 1
    assert dict(net.ask({"a": TASK}))["a"] is not None
    assert grid.nodes[1].asked == [Kind.HELLO, Kind.TRAIN]  # once


def test_a_superlink_that_stays_away_costs_the_round_and_no_more() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, deadline=0.5)
    net.clients()
    grid.away = 1 << 30
    began = time.monotonic()
    assert dict(net.ask({"a": TASK})) == {"a": None}
    assert time.monotonic() - began < 3
    assert net.online() == set()
    grid.away = 0
    assert net.online() == {"a"}


def test_what_flower_says_of_a_failure_is_the_reply() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid)
    net.clients()
    grid.nodes[1].fails = "type:<'train'>\nboom"
    packet = dict(net.ask({"a": TASK}))["a"]
    assert packet is not None
    reply = unpack_reply(packet, 0)
    assert (reply.client, reply.round, reply.error) == ("a", 1, "Flower error 2: boom")


def test_a_reply_that_is_no_packet_is_an_error_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid)
    net.clients()

    def nothing(packet: Packet) -> RecordDict:
        return RecordDict()

    monkeypatch.setattr(f"{__name__}.to_flower", nothing)
    packet = dict(net.ask({"a": TASK}))["a"]
    assert packet is not None
    assert "not a packet" in unpack_reply(packet, 0).error


def test_too_few_clients_are_waited_for_and_then_said() -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb", fails="model differs")})
    began = time.monotonic()
    with pytest.raises(StoppedError, match="2 nodes are online, 1 as clients; needed: 2 clients"):
        network(grid, clients=2, wait=0.5).clients()
    assert time.monotonic() - began < 5
    with pytest.raises(RoundError, match="model differs"):
        network(LocalGrid({2: grid.nodes[2]})).clients()
    grid.nodes[3] = Node("c", "kc")
    assert network(grid, clients=2, wait=5).clients() == {"a": 10, "c": 10}


def test_nodes_that_come_later_are_clients_too() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid)
    assert net.clients() == {"a": 10}
    grid.nodes[2] = Node("b", "kb")
    until(lambda: net.online() == {"a", "b"})
    assert net.clients() == {"a": 10, "b": 10}


def test_a_node_that_never_says_who_it_is_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELLO", 0.3)
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb", silent=True)})
    assert network(grid, clients=1, wait=5).clients() == {"a": 10}


@pytest.mark.parametrize("at", ["clients", "ask", "online"])
def test_stop_is_heard_wherever_it_waits(at: str) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    stop = threading.Event()
    net = network(grid, stop=stop, clients=2 if at == "clients" else 1, wait=60)
    if at != "clients":
        net.clients()
    grid.nodes[1].silent = True
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        if at == "clients":
            net.clients()
        elif at == "ask":
            list(net.ask({"a": TASK}))
        else:
            until(lambda: not net.online())
    assert time.monotonic() - began < 4


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
