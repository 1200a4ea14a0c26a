"""A phone with a valid token that asks for chunks of a model and takes none of them.

Its window is closed, so each answer of 1 MiB stays in the gateway's memory for as long as the
connection does. Where a call counts only until it is answered, one connection fills the memory with
50 MiB a second.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from corolla.host.door import Visitor
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import service
from tests.attacks.http2 import Connection
from tests.server.gateway import gateways
from tests.server.gateway.gateways import Clock, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, Clock(), seats=4) as found:
        yield found


def asking(world: World, number: int) -> Connection:
    """A connection that has asked for so many chunks."""
    blob = world.gateway.blobs.put(os.urandom(1 << 20))
    request = pb.DownloadRequest(sha256=blob.sha256).SerializeToString()
    made = Connection(world.address, world.folder / "certs" / "ca.pem", gateways.TOKEN)
    for _ in range(number):
        made.call("/corolla.v1.Phones/Download", request)
    return made


def test_an_answer_that_is_not_taken_in_time_ends_the_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.TAKEN, "Download", 0.1)
    found = asking(world, 3)
    with closing(found.socket):
        assert found.ended(60)


def test_untaken_answers_count_as_open_calls_and_one_too_many_ends_them(world: World) -> None:
    found = asking(world, service.MOST["connection"] + 1)
    with closing(found.socket):
        assert found.ended(60)


def test_where_untaken_answers_end_nothing_they_stay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Visitor, "end", lambda _: None)
    monkeypatch.setitem(service.TAKEN, "Download", 0.1)
    found = asking(world, service.MOST["connection"] + 1)
    with closing(found.socket):
        assert not found.ended(2)
