"""A registered client that joins under the name of another before that one is there.

The nodes are functions behind a Grid of this process; members and keys are those of a real folder.
"""

from pathlib import Path
from typing import Any

import pytest

from corolla.host import certificates
from corolla.server.deployment import members
from corolla.server.deployment.grid import GridNetwork, hello
from corolla.server.deployment.limits import Admission, Limits
from corolla.server.deployment.members import Roll
from corolla.wire.messages import Kind, unpack_task
from corolla.wire.packet import from_flower
from corolla.wire.task_settings import RunSettings
from tests.e2e.federation import make_key
from tests.server.deployment.test_grid import (
    RUN,
    TASK,
    Clock,
    LocalGrid,
    Node,
    identity,
    until,
)

__all__ = ["identity"]  # messages can only be made inside a task of Flower


class Keys:
    """A folder of registered keys, as the owner of a server fills it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._private = folder / "keys", folder
        self.folder.mkdir()

    def register(self, name: str) -> str:
        """A new key in NAME.pub, bound as a server does it; the key in PEM."""
        make_key(self._private, name, self.folder)
        pem = certificates.public_key(self.folder / f"{name}.pub")
        members.admit(self.folder, name, pem)
        return pem.decode()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def network(grid: LocalGrid, keys: Keys, clock: Clock, nodes: int = 0) -> GridNetwork:
    admission = Admission(
        nodes=nodes,
        clients=1,
        names=keys.folder.parent / "names.json",
        members=keys.folder,
        limits=Limits(),
    )
    return GridNetwork(grid, hello(RUN, RunSettings({})), 5.0, clock, admission, clock)


def told(grid: LocalGrid, node: int) -> list[str]:
    """What a node was told of why it is left out."""
    tasks = [
        unpack_task(from_flower(message.content, 1 << 20))
        for message in grid.sent.values()
        if message.metadata.dst_node_id == node
    ]
    return [task.refusal for task in tasks if task.refusal]


def test_without_members_the_first_key_holds_the_name_of_another(
    keys: Keys, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Roll, "changed", lambda _: False)
    grid = LocalGrid({1: Node("ben", keys.register("eve")), 2: Node("ada", keys.register("ada"))})
    net = network(grid, keys, clock)
    until(lambda: net.online() == {"ben", "ada"}, clock)
    grid.nodes[3] = Node("ben", keys.register("ben"))
    clock.wait(600.0)
    assert net.online() == {"ben", "ada"}
    assert dict(net.ask({"ben": TASK}))["ben"] is not None
    assert Kind.TRAIN in grid.nodes[1].asked
    assert Kind.TRAIN not in grid.nodes[3].asked
    assert "two nodes" in told(grid, 3)[0]  # it is told now, but left out


def test_the_name_of_a_member_is_its_keys_whoever_comes_first(keys: Keys, clock: Clock) -> None:
    ben = keys.register("ben")
    grid = LocalGrid({1: Node("ben", keys.register("eve")), 2: Node("ada", keys.register("ada"))})
    net = network(grid, keys, clock)
    until(lambda: net.online() == {"ada"}, clock)
    assert told(grid, 1) == [
        "the name 'ben' is registered for another key: give this client --name eve"
    ]
    grid.nodes[3] = Node("ben", ben)
    until(lambda: net.online() == {"ada", "ben"}, clock)
    assert dict(net.ask({"ben": TASK}))["ben"] is not None
    assert grid.nodes[3].asked[-1] == Kind.TRAIN
    assert Kind.TRAIN not in grid.nodes[1].asked


def test_a_member_that_is_registered_later_gets_its_name_from_who_has_it(
    keys: Keys, clock: Clock
) -> None:
    grid = LocalGrid({1: Node("ben", keys.register("eve")), 2: Node("ada", keys.register("ada"))})
    net = network(grid, keys, clock)
    until(lambda: net.online() == {"ben", "ada"}, clock)
    grid.nodes[3] = Node("ben", keys.register("ben"))
    until(lambda: net.online() == {"ada"} or net._members["ben"][0] == 3, clock)
    until(lambda: net.online() == {"ada", "ben"}, clock)
    assert net._members["ben"][0] == 3
    assert "registered for another key" in told(grid, 1)[0]


def test_a_removed_member_is_out_at_once_in_the_midst_of_a_round_too(
    keys: Keys, clock: Clock
) -> None:
    grid = LocalGrid({n: Node(name, keys.register(name)) for n, name in enumerate(("ada", "ben"))})
    net = network(grid, keys, clock)
    until(lambda: net.online() == {"ada", "ben"}, clock)
    grid.nodes[1].silent = True
    clock.after(1.0, lambda: members.remove(keys.folder, "ben"))
    began = clock()
    assert dict(net.ask({"ada": TASK, "ben": TASK}))["ben"] is None
    assert clock() - began < 2.0  # not at the deadline
    grid.nodes[1].silent = False
    assert net.online() == {"ada"}
    assert told(grid, 1) == ["its key was removed by the owner of the server"]
    assert dict(net.ask({"ben": TASK})) == {"ben": None}
    members.restore(keys.folder, "ben")
    until(lambda: net.online() == {"ada", "ben"}, clock)


def test_a_reply_that_comes_after_its_member_was_removed_does_not_count(
    keys: Keys, clock: Clock
) -> None:
    """Also where the replies of all have come, and those before it take a while to be judged."""
    grid = LocalGrid({n: Node(name, keys.register(name)) for n, name in enumerate(("ada", "ben"))})
    net = network(grid, keys, clock)
    until(lambda: net.online() == {"ada", "ben"}, clock)
    replies = net.ask({"ada": TASK, "ben": TASK})
    first, packet = next(replies)
    assert packet is not None
    members.remove(keys.folder, "ben" if first == "ada" else "ada")
    assert [packet for _, packet in replies] == [None]


def test_a_name_that_no_member_has_is_the_first_keys_as_ever(keys: Keys, clock: Clock) -> None:
    keys.register("ada")
    grid = LocalGrid({1: Node("client-12", keys.register("eve")), 2: Node("x", "unregistered")})
    net: Any = network(grid, keys, clock)
    until(lambda: net.online() == {"client-12", "x"}, clock)
