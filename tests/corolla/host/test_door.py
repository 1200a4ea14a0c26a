"""A door before a server on loopback: bytes go on as they are, callers are counted and known."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from corolla.host import door as module
from corolla.host.door import Door, Visitor, listening

MIB = 1 << 20


class House:
    """A server that says everything again, behind a door. Who has come by it, in this order."""

    def __init__(self) -> None:
        self.visitors: list[Visitor | None] = []
        self.door: Door
        self.knows = True
        self.writers: list[asyncio.StreamWriter] = []

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        said = 0
        try:
            while data := await reader.read(1 << 16):
                if not said:  # with its first bytes it is there
                    visitor = self.door.visitor(writer.get_extra_info("peername")[1])
                    self.visitors.append(visitor)
                    if visitor and self.knows:
                        visitor.known()
                said += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass


@asynccontextmanager
async def house(most: int = 40, address: str = "127.0.0.1:0") -> AsyncIterator[House]:
    made = House()
    async with await asyncio.start_server(made.echo, "127.0.0.1", 0) as server:
        made.door = Door(address, most)
        made.door.open(server.sockets[0].getsockname()[1])
        try:
            yield made
        finally:
            made.door.close()
            for writer in made.writers:
                writer.transport.abort()
            await asyncio.sleep(0.01)


async def visit(found: House, host: str = "127.0.0.1", source: str | None = None) -> Any:
    local = (source, 0) if source else None
    made = await asyncio.open_connection(host, found.door.port, local_addr=local)
    found.writers.append(made[1])
    return made


def in_time(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_bytes_go_on_both_ways_also_to_who_reads_late() -> None:
    async def test() -> None:
        async with house() as found:
            reader, writer = await visit(found)
            data = os.urandom(8 * MIB)
            writer.write(data)
            await asyncio.sleep(0.2)  # nobody reads: the door takes in no more than its buffers
            assert await reader.readexactly(len(data)) == data
            assert [own.network for own in found.visitors if own] == ["127.0.0.1"]

    in_time(test)


def test_who_is_not_known_is_heard_no_further_than_a_first_call() -> None:
    async def test() -> None:
        async with house() as found:
            found.knows = False
            reader, writer = await visit(found)
            data = os.urandom(4 * MIB)
            writer.write(data)
            assert await reader.readexactly(module.FIRST) == data[: module.FIRST]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await reader.readexactly(MIB)
            assert found.visitors[0]
            found.visitors[0].known()
            assert len(await reader.readexactly(2 * MIB)) == 2 * MIB

    in_time(test)


def test_who_does_not_become_known_ends_in_time_and_the_visitor_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.1)

    async def test() -> None:
        async with house() as found:
            found.knows = False
            reader, _ = await visit(found)
            assert await ended(reader)
            while found.door._visitors:
                await asyncio.sleep(0.01)

    in_time(test)


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


def test_the_one_that_has_been_without_a_call_for_longest_ends_for_a_new_one() -> None:
    async def test() -> None:
        async with house(most=8) as found:
            first = await visit(found)
            await spoken(first)
            second = await visit(found)
            await spoken(second)
            assert found.visitors[0]
            with found.visitors[0].at_work():
                third = await visit(found)  # of one network two at most
                await spoken(third)
                assert await ended(second[0])
                await spoken(first)
            other = await visit(found, source="127.0.0.2")
            for own in (first, third, other):
                await spoken(own)

    in_time(test)


async def spoken(own: Any) -> None:
    reader, writer = own
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"


def test_a_server_that_is_away_ends_the_connection_and_the_place_is_free() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        made = Door("127.0.0.1:0", 4)
        made.open(port)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            assert await ended(reader)
            writer.transport.abort()
        made.close()
        await asyncio.sleep(0.01)

    in_time(test)


def test_an_address_that_is_taken_cannot_be_had_until_its_door_is_closed() -> None:
    made = Door("127.0.0.1:0", 4)
    with pytest.raises(OSError, match="in use"):
        Door(f"127.0.0.1:{made.port}", 4)
    made.close()
    Door(f"127.0.0.1:{made.port}", 4).close()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "0.0.0.0:0", "[::]:0"])
def test_a_host_is_all_its_addresses_at_one_port(address: str) -> None:
    found = listening(address)
    ports = {own.getsockname()[1] for own in found}
    assert len(ports) == 1
    with socket.create_connection(("127.0.0.1", ports.pop()), 60):
        pass
    for own in found:
        own.close()
