"""Clients behind a Grid: names and keys, deadlines, a SuperLink that goes away and comes back.

The Grid is one of this process, with nodes that are functions; Flower's own is in tests/e2e.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid

from corolla.errors import RoundError, StoppedError, WireError
from corolla.host import logs
from corolla.server.deployment import calls, pulling
from corolla.server.deployment import grid as module
from corolla.server.deployment.grid import GridNetwork, hello
from corolla.server.deployment.limits import Admission, Limits
from corolla.wire.messages import (
    Kind,
    Reply,
    Task,
    pack_reply,
    pack_task,
    unpack_reply,
    unpack_task,
)
from corolla.wire.packet import Packet, from_flower, to_flower
from corolla.wire.task_settings import RunSettings

RUN = "5f" * 16
TASK = pack_task(Task(RUN, 1, "v", Kind.TRAIN, "{}"))


@dataclass
class Node:
    """A client of a name; `silent`: it never answers; `fails`: Flower says so in its place.

    `lost`: for each of its next messages, how Flower loses it: with a code, or (0) without a word.
    """

    name: str
    key: str
    online: bool = True
    silent: bool = False
    fails: str = ""
    seats: int = 0
    examples: int = 10
    raises: Exception | None = None
    lost: list[int] = field(default_factory=list)
    asked: list[Kind] = field(default_factory=list)


class LocalGrid(Grid):
    """Answers at the next pull. `away` is how many calls will fail, as of a SuperLink that died."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes, self.away, self.lost = nodes, 0, 0
        self.sent: dict[str, Message] = {}
        self.refused: set[int] = set()
        self.dropped: set[str] = set()

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
            refused = message.metadata.dst_node_id in self.refused
            ids.append("" if refused else message.object_id)
            if not refused:
                self.sent[message.object_id] = message
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
            if node.lost:
                if code := node.lost.pop(0):
                    del self.sent[sent]
                    yield Message(Error(code, "unavailable"), reply_to=message)
                else:
                    self.dropped.add(sent)
            if sent in self.dropped or sent not in self.sent:
                continue
            del self.sent[sent]
            task = unpack_task(from_flower(message.content, 1 << 20))
            node.asked.append(task.kind)
            if node.raises:
                raise node.raises
            if node.fails:
                yield Message(Error(2, node.fails), reply_to=message)
                continue
            reply = Reply(
                task.run_id,
                task.round,
                task.base_version,
                task.kind,
                node.name,
                num_examples=node.examples,
                seats=node.seats,
            )
            yield Message(to_flower(pack_reply(reply)), reply_to=message)

    def _call(self) -> None:
        if self.away:
            self.away -= 1
            raise httpx.ConnectError("away")


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can only be made inside a task of Flower."""
    for name, value in {"_run_id": 1, "_task_id": 1, "_node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class Clock(threading.Event):
    """The signal to stop, and a clock that goes on whenever somebody waits for that signal."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.due: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        """Do something once so much time has passed."""
        self.due.append((self.now + seconds, what))

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        past = [what for at, what in self.due if at <= self.now]
        self.due = [(at, what) for at, what in self.due if at > self.now]
        for what in past:
            what()
        return self.is_set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def network(
    grid: Grid, clock: Clock | None = None, deadline: float = 5.0, **admission: Any
) -> GridNetwork:
    stop = clock or Clock()
    return GridNetwork(
        grid, hello(RUN, RunSettings({})), deadline, stop, Admission(**admission), stop
    )


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


@pytest.mark.parametrize(("clients", "seconds"), [(0, 600.0), (1, 120.0)])
def test_a_hello_lives_longer_where_no_node_joins_later(
    clock: Clock, clients: int, seconds: float
) -> None:
    grid = LocalGrid({1: Node("a", "k", silent=True)})
    network(grid, clock, nodes=1, clients=clients).online()
    (sent,) = grid.sent.values()
    assert sent.metadata.ttl == seconds


def test_messages_live_as_long_as_a_round(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, clock, deadline=0.6)
    net.clients()
    grid.nodes[1].silent = True
    began = clock()
    assert list(net.ask({"a": TASK})) == [("a", None)]
    assert 0.6 <= clock() - began <= 0.6 + calls.POLL
    (left,) = grid.sent.values()
    assert left.metadata.ttl == 0.6


def test_a_name_belongs_to_the_first_key_that_used_it_for_the_whole_run(
    tmp_path: Path, clock: Clock
) -> None:
    names = tmp_path / "names.json"
    thief = Node("a", "other key")
    grid = LocalGrid({1: Node("a", "key"), 2: Node("b", "b's")})
    assert network(grid, nodes=2, names=names).clients() == {"a": 10, "b": 10}
    # The run goes on in another process; the owner of the name is away.
    grid = LocalGrid({2: Node("b", "b's"), 3: thief})
    net = network(grid, clock, clients=1, names=names)
    assert net.clients() == {"b": 10}
    assert net.online() == {"b"}
    grid.nodes[4] = Node("a", "key")
    until(lambda: net.online() == {"a", "b"}, clock)
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


def test_a_node_that_comes_back_with_another_id_is_found_again(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, clock, nodes=2)
    net.clients()
    grid.nodes[1].online = False
    grid.nodes[9] = Node("a", "k")
    until(lambda: net.online() == {"a", "b"}, clock)
    assert dict(net.ask({"a": TASK}))["a"] is not None
    assert grid.nodes[9].asked == [Kind.HELLO, Kind.TRAIN]


def test_who_is_offline_or_refused_gives_no_answer_at_once(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, clock, nodes=2)
    net.clients()
    grid.nodes[1].online = False
    assert net.online() == {"b"}
    grid.refused = {2}
    began = clock()
    assert dict(net.ask({"b": TASK, "stranger": TASK})) == {"b": None, "stranger": None}
    assert clock() == began


def test_a_superlink_that_is_away_for_a_while_costs_time_and_nothing_else(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    grid.away = 3
    net = network(grid, clock, deadline=30.0)
    assert net.clients() == {"a": 10}
    grid.away = 3
    assert dict(net.ask({"a": TASK}))["a"] is not None
    answers = net.ask({"a": TASK})
    grid.nodes[1].silent = True
    clock.after(1.0, lambda: setattr(grid, "away", 3))
    clock.after(2.0, lambda: setattr(grid.nodes[1], "silent", False))
    assert dict(answers)["a"] is not None
    assert not clock.due
    assert grid.away == 0


def test_a_message_whose_receipt_is_lost_is_still_waited_for() -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid)
    net.clients()
    grid.lost = 1
    assert dict(net.ask({"a": TASK}))["a"] is not None
    assert grid.nodes[1].asked == [Kind.HELLO, Kind.TRAIN]  # once


def test_a_message_that_is_refused_is_not_waited_for_though_a_receipt_was_lost(
    clock: Clock,
) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, clock, nodes=2)
    net.clients()
    grid.lost, grid.refused = 1, {2}
    began = clock()
    answers = dict(net.ask({"a": TASK, "b": TASK}))
    assert answers["a"] is not None
    assert answers["b"] is None
    assert clock() - began <= 2 * calls.AWAY + 2 * calls.POLL


def test_flower_still_gives_a_message_that_it_has_its_id_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A SuperLink's database takes a message twice, and one to a node that is unknown never."""
    factory = LinkStateFactory(":memory:", NoOpFederationManager(), ObjectStoreFactory(":memory:"))
    state = factory.state()
    node = state.create_node("owner", "owner", b"key", 60.0)
    state.activate_node(node, 60.0)
    kind = TaskType.SERVER_APP
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, kind)
    monkeypatch.setattr(TaskIdentity, "_run_id", run)

    def stored(to: int) -> str | None:
        message = Message(RecordDict(), to, "train", ttl=60)
        message.metadata.__dict__["_message_id"] = id = message.object_id
        assert state.store_message_ins(message) in (id, None)
        return state.store_message_ins(message)

    assert stored(node)
    assert stored(node + 1) is None


def test_a_superlink_that_stays_away_costs_the_round_and_no_more(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, clock, deadline=5.0)
    net.clients()
    grid.away = 1 << 30
    began = clock()
    assert dict(net.ask({"a": TASK})) == {"a": None}
    assert 5.0 <= clock() - began <= 5.0 + 2 * calls.AWAY
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


def test_too_few_clients_are_waited_for_and_then_said(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb", fails="model differs")})
    began = clock()
    with pytest.raises(StoppedError, match="2 nodes are online, 1 as clients; needed: 2 clients"):
        network(grid, clock, clients=2, wait=7.0).clients()
    assert 7.0 <= clock() - began <= 7.0 + 2 * calls.POLL
    with pytest.raises(RoundError, match="model differs"):
        network(LocalGrid({2: grid.nodes[2]})).clients()
    grid.nodes[3] = Node("c", "kc")
    assert network(grid, clients=2, wait=5).clients() == {"a": 10, "c": 10}


@pytest.mark.parametrize("how", [0, 3, 4, 5])
def test_a_hello_that_flower_loses_is_said_again_soon(clock: Clock, how: int) -> None:
    """As when a ServerApp is killed while its tasks are on their way: the next one asks again."""
    grid = LocalGrid({1: Node("a", "k", lost=[how]), 2: Node("b", "kb")})
    began = clock()
    assert network(grid, clock, clients=2, wait=100).clients() == {"a": 10, "b": 10}
    assert clock() - began <= module.REPEAT + 2 * calls.POLL
    assert grid.nodes[1].asked == grid.nodes[2].asked == [Kind.HELLO]


def test_a_node_is_asked_more_and_more_seldom_and_any_answer_counts(clock: Clock) -> None:
    """A slow node has answered the first hello in the end: those behind it change nothing."""
    grid = LocalGrid({1: Node("a", "k", silent=True), 2: Node("b", "kb")})
    net = network(grid, clock, clients=1, wait=100)
    until(lambda: net.online() == {"b"}, clock)
    times = list[float]()
    began = clock()
    while clock() - began < module.HELLO - 2 * calls.POLL:
        sent = len(grid.sent)
        net.online()
        times += [clock() - began] * (len(grid.sent) - sent)
        clock.wait(calls.POLL)
    assert [round(time / module.REPEAT) for time in times] == [1, 3, 7]
    grid.nodes[1].silent = False
    until(lambda: net.online() == {"a", "b"}, clock)
    asked = len(grid.nodes[1].asked)
    clock.wait(2 * module.HELLO)
    assert net.online() == {"a", "b"}
    assert len(grid.nodes[1].asked) == asked


def test_a_node_of_which_flower_knows_nothing_is_left_out_in_time(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k", lost=[3] * 9), 2: Node("b", "kb")})
    assert network(grid, clock, clients=1, wait=2 * module.HELLO).clients() == {"b": 10}
    assert 4 <= 9 - len(grid.nodes[1].lost) <= 5


def test_nodes_that_come_later_are_clients_too(clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, clock)
    assert net.clients() == {"a": 10}
    grid.nodes[2] = Node("b", "kb")
    until(lambda: net.online() == {"a", "b"}, clock)
    assert net.clients() == {"a": 10, "b": 10}


def test_a_node_that_never_says_who_it_is_holds_nobody_up() -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb", silent=True)})
    assert network(grid, clients=1, wait=2 * module.HELLO).clients() == {"a": 10}


@pytest.mark.parametrize("at", ["clients", "ask", "online"])
def test_stop_is_heard_wherever_it_waits(at: str, clock: Clock) -> None:
    grid = LocalGrid({1: Node("a", "k")})
    net = network(grid, clock, clients=2 if at == "clients" else 1, wait=60)
    if at != "clients":
        net.clients()
    grid.nodes[1].silent = True
    began = clock()
    clock.after(1.0, clock.set)
    with pytest.raises(StoppedError):
        if at == "clients":
            net.clients()
        elif at == "ask":
            list(net.ask({"a": TASK}))
        else:
            until(lambda: not net.online(), clock)
    assert clock() - began <= 2.0


@pytest.mark.parametrize(
    "error", [json.JSONDecodeError("not json", "x", 0), KeyError("Odd"), WireError("too much")]
)
def test_a_reply_that_flower_cannot_read_is_that_clients_error(
    error: Exception, clock: Clock
) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb"), 3: Node("c", "kc")})
    net = network(grid, clock, nodes=3)
    net.clients()
    grid.nodes[2].raises = error
    answers = dict(net.ask(dict.fromkeys("abc", TASK)))
    said = {c: unpack_reply(p, 0).error for c, p in answers.items() if p}
    assert said.keys() == {"a", "b", "c"}
    assert said["a"] == said["c"] == ""
    assert said["b"] in ("too much", f"not a packet: Flower raised {type(error).__name__}")
    grid.nodes[4] = Node("d", "kd", raises=error)  # it cannot even say hello
    until(lambda: Kind.HELLO in grid.nodes[4].asked or not net.online(), clock)
    assert net.online() == {"a", "b", "c"}


def test_replies_are_pulled_one_by_one_and_a_refused_call_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = LocalGrid({1: Node("a", "k"), 2: Node("b", "kb")})
    net = network(grid, nodes=2, deadline=0.5)
    net.clients()
    real, pulled = grid.pull_messages, list[int]()

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        pulled.append(len(ids))
        if grid.sent[ids[0]].metadata.dst_node_id == 1:
            request = httpx.Request("POST", "http://x")
            raise httpx.HTTPStatusError("500", request=request, response=httpx.Response(500))
        return real(ids)

    monkeypatch.setattr(grid, "pull_messages", pull)
    answers = dict(net.ask({"a": TASK, "b": TASK}))
    assert answers["a"] is None
    assert answers["b"] is not None
    assert set(pulled) == {1}


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (Node("x" * 129, "k"), "longer than 128"),
        (Node("a\x1b[2J", "k"), "not printable"),
        (Node("gate/1", "k"), "phones behind a gateway"),
        (Node("a", "k", examples=0), "no examples"),
        (Node("a", "k", examples=101), "101 examples, more than max-examples 100"),
        (Node("a", "k", seats=3), "buffer is on"),
    ],
)
def test_what_a_hello_may_not_claim_leaves_its_node_out(
    tmp_path: Path, node: Node, why: str
) -> None:
    grid = LocalGrid({1: Node("ok", "k1", examples=100), 2: node})
    limits = Limits(examples=100, no_gateways="buffer is on")
    net = network(grid, nodes=2, names=tmp_path / "names.json", limits=limits)
    assert net.clients() == {"ok": 100}
    (said,) = net._reasons.values()
    assert why in said
    assert "\n" not in said


def test_seats_are_bounded_and_follow_what_a_gateway_says(clock: Clock) -> None:
    grid = LocalGrid({1: Node("gate", "k", seats=2)})
    net = network(grid, clock, limits=Limits(seats=5))
    net.clients()
    assert net.seats() == {"gate": 2}
    grid.nodes[1].seats = 7
    until(lambda: net.online() and net.seats() == {"gate": 5}, clock)
    grid.nodes[1].fails = "busy"
    asked = len(grid.nodes[1].asked)
    until(lambda: net.online() and len(grid.nodes[1].asked) > asked, clock)
    assert net.seats() == {"gate": 5}


def test_a_gateway_that_is_asked_again_keeps_its_name(clock: Clock) -> None:
    grid = LocalGrid({1: Node("gate", "k", seats=2)})
    net = network(grid, clock, limits=Limits())
    net.clients()
    grid.nodes[1].name = "second"
    until(lambda: net.online() and len(grid.nodes[1].asked) > 1, clock)
    net.online()
    assert net.clients().keys() == {"gate"}


class Runtime:
    """The part of a SuperLink that hands out one reply: its objects as they were deflated."""

    def __init__(self, objects: dict[str, bytes], tree: ObjectTree, reply_to: str = "m") -> None:
        self.objects, self.confirmed, self.missing = objects, list[str](), set[str]()
        self.trees = [tree]
        self.metadata = [ProtoMetadata(message_id=tree.object_id, reply_to_message_id=reply_to)]

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        messages = [ProtoMessage(metadata=one) for one in self.metadata]
        return PullAppMessagesResponse(messages_list=messages, message_object_trees=self.trees)

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        return PullObjectResponse(
            object_found=True,
            object_available=request.object_id not in self.missing,
            object_content=self.objects[request.object_id],
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def a_reply(records: RecordDict) -> Runtime:
    asked = Message(RecordDict(), 1, "train", ttl=60)
    asked.metadata.__dict__["_message_id"] = "m"
    reply = Message(records, reply_to=asked)
    objects = {i: found.deflate() for i, found in get_all_nested_objects(reply).items()}
    return Runtime(objects, get_object_tree(reply))


def pulled(runtime: Runtime, most: int, stop: threading.Event | None = None) -> list[Message]:
    """By a Grid of Flower itself, of which only the connection is another."""
    grid = HttpGrid(token="t")
    grid.set_run(Run.create_empty(1))
    grid._client = runtime  # type: ignore[assignment]
    bounded = pulling.bound(grid, stop or threading.Event())
    assert bounded is not None
    bounded.most = most
    return list(grid.pull_messages(["m"]))


def payload(size: int, value: int | None = None) -> RecordDict:
    data = bytes([value]) * size if value is not None else bytes(range(256)) * (size // 256)
    return to_flower(Packet(b"header", data))


def test_an_honest_reply_passes_what_counts_its_bytes() -> None:
    runtime = a_reply(payload(12 << 20, 0))  # zeros: its chunks are all the same
    (message,) = pulled(runtime, 18 << 20)
    assert from_flower(message.content, 1 << 30).payload == bytes(12 << 20)
    assert len(runtime.confirmed) == 1


def test_an_array_that_names_a_chunk_again_and_again_is_never_inflated() -> None:
    runtime = a_reply(payload(1 << 20, 7))
    (name,) = [i for i, found in runtime.objects.items() if found.startswith(b"Array ")]
    head, body = runtime.objects[name].split(b"\x00", 1)
    fields = {**json.loads(body), "arraychunk_ids": [0] * 300}
    body = json.dumps(fields).encode()
    runtime.objects[name] = b" ".join([*head.split(b" ")[:2], b"%d" % len(body)]) + b"\x00" + body
    (message,) = pulled(runtime, 400 << 20)  # Flower itself makes 300 MiB of 1
    assert len(message.content["payload"]["packet"].data) > 300 << 20  # type: ignore[union-attr]
    with pytest.raises(WireError, match="more than 67108864 bytes"):
        pulled(runtime, 64 << 20)


def test_objects_that_are_too_many_or_too_large_are_refused() -> None:
    with pytest.raises(WireError, match="more than 1048576 bytes"):
        pulled(a_reply(payload(2 << 20)), 1 << 20)
    with pytest.raises(WireError, match="too large records"):
        pulled(a_reply(to_flower(Packet(bytes(2 << 20), b""))), 0)
    runtime = a_reply(payload(256))
    runtime.trees[0].children.extend([ObjectTree(object_id="0" * 64)] * 1001)
    with pytest.raises(WireError, match="more than 1000 objects"):
        pulled(runtime, 1 << 19)


def test_a_message_that_answers_nothing_is_not_read() -> None:
    runtime = a_reply(payload(256))
    runtime.metadata[0].reply_to_message_id = "another"
    assert pulled(runtime, 1 << 20) == []


def test_a_reply_whose_rest_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = a_reply(payload(256))
    runtime.missing = set(runtime.objects)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        pulled(runtime, 1 << 20, stop)
    monkeypatch.setattr(pulling, "STALLED", -1.0)
    with pytest.raises(WireError, match="has not come"):
        pulled(runtime, 1 << 20)


def test_a_body_that_is_no_json_is_that_clients_error() -> None:
    runtime = a_reply(payload(256))
    (name,) = [i for i, found in runtime.objects.items() if found.startswith(b"RecordDict ")]
    head = runtime.objects[name].split(b"\x00")[0].rsplit(b" ", 1)[0]
    runtime.objects[name] = head + b" 8\x00not json"
    with pytest.raises(json.JSONDecodeError):
        pulled(runtime, 1 << 20)


def test_flower_still_calls_its_client_and_its_retries_what_we_do() -> None:
    grid = HttpGrid(token="t", insecure=True)
    assert grid._retry_invoker.max_tries is None or grid._retry_invoker.max_tries > 1
    net = GridNetwork(
        grid, hello(RUN, RunSettings({})), 1.0, threading.Event(), Admission(limits=Limits())
    )
    assert grid._retry_invoker.max_tries == 1
    assert net._calls.bounded is not None
    assert id(grid._runtime_client) == id(net._calls.bounded)
    grid._disconnect()


def until(true: Callable[[], object], clock: Clock) -> None:
    """Let time go on until something is true, for a quarter of an hour at most."""
    for _ in range(900):
        if true():
            return
        clock.wait(1.0)
    raise AssertionError("it never happened")
