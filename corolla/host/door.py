"""A door before a server that counts no connections: it takes them, and passes their bytes on.

The server listens on loopback. Who is let in is counted by network and in all, from the moment that
the connection is taken, and is known to the server by the port that its bytes come from.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from corolla.host.occupancy import Occupancy, Occupant, network

SHARE = 4
"""One network has at most this part of all connections: many callers may share it."""
SILENCE = 20.0
"""Seconds in which a connection must become that of a caller who is known."""
FIRST = 1 << 17
"""Bytes that are passed on of a caller until it is known: TLS, and the head of a first call."""
_PAUSE = 0.1
"""Seconds until the next try where a connection cannot be taken."""
_HOST = "127.0.0.1"


class Visitor:
    """One connection from outside. For the use of the door's event loop."""

    def __init__(self, network: str, occupant: Occupant, occupancy: Occupancy) -> None:
        self.network = network
        """The place whose callers count together."""
        self._occupant, self._occupancy = occupant, occupancy
        self._at_work = 0
        self._late: asyncio.TimerHandle | None = None
        self._halves: list[_Half] = []
        self._heard = 0

    def known(self) -> None:
        """Notes that its caller is one of those who may call."""
        if self._late is None:
            return
        self._late.cancel()
        self._late = None
        for half in self._halves:
            half.held = False
            half.turn()

    def hears(self, half: "_Half", more: int) -> None:
        """Counts bytes that have come from outside; who is not known has to wait after FIRST."""
        self._heard += more
        if self._late and self._heard >= FIRST:
            half.held = True
            half.turn()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """One more call of it is at work; without any, it waits for its caller."""
        self._at_work += 1
        self._occupancy.settle(self._occupant)
        try:
            yield
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._occupancy.wait(self._occupant)

    def end(self) -> None:
        """End the connection at once, with all that is on its way."""
        for half in self._halves:
            half.transport.abort()

    def begin(self, halves: "list[_Half]") -> None:
        """Notes the two halves: from now on bytes are passed on."""
        self._halves, self._occupant.end = halves, self.end
        self._late = asyncio.get_running_loop().call_later(SILENCE, self.end)

    def over(self) -> None:
        self.known()
        self._occupancy.leave(self._occupant)


class _Half(asyncio.Protocol):
    """One side of a connection: what it hears, the other side says; both end together."""

    transport: asyncio.Transport
    other: "_Half"
    held = False
    """True while what it says has to wait."""
    full = False
    """True while the other side has too much to say already."""
    heard: Callable[[int], None] = staticmethod(lambda more: None)
    ended: Callable[[], None] = staticmethod(lambda: None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.pause_reading()  # until the other side is there

    def turn(self) -> None:
        """Read on, or not."""
        if self.held or self.full:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)
        self.heard(len(data))

    def pause_writing(self) -> None:
        self.other.full = True
        self.other.turn()

    def resume_writing(self) -> None:
        self.other.full = False
        self.other.turn()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended()


class Door:
    """Takes connections at an address for a server on loopback."""

    def __init__(self, address: str, most: int) -> None:
        """`most`: connections at a time. Raises OSError when the address cannot be had."""
        self._listening = listening(address)
        self.port = int(self._listening[0].getsockname()[1])
        self._most = most
        self._occupancy = Occupancy()
        self._visitors: dict[int, Visitor] = {}
        """Port of loopback → the visitor whose bytes come from it."""
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, port: int) -> None:
        """Let visitors in, to the server at a port of loopback. In a running event loop."""
        for own in self._listening:
            own.setblocking(False)
            self._run(self._take_all(own, port))

    def close(self) -> None:
        """End all connections; the address is free afterwards."""
        for task in list(self._tasks):
            task.cancel()
        for visitor in list(self._visitors.values()):
            visitor.end()
        for own in self._listening:
            own.close()

    def visitor(self, port: int) -> Visitor | None:
        """The visitor whose bytes come from a port of loopback; None for who has not come by it."""
        return self._visitors.get(port)

    def _run(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _take_all(self, listening: socket.socket, port: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(listening)
            except OSError:  # too many files
                await asyncio.sleep(_PAUSE)
                continue
            place = network(address)
            bounds = {place: max(1, self._most // SHARE), "": self._most}
            occupant = Occupant(bounds, lambda: None)
            if self._occupancy.enter(occupant):
                visitor = Visitor(place, occupant, self._occupancy)
                occupant.end = self._run(self._let_in(connection, visitor, port)).cancel
                await asyncio.sleep(0)  # it has begun before another may end it
            else:
                connection.close()

    async def _let_in(self, connection: socket.socket, visitor: Visitor, port: int) -> None:
        """Connect both sides; from then on they end each other."""
        loop = asyncio.get_running_loop()
        outer, inner = _Half(), _Half()
        outer.other, inner.other = inner, outer
        try:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(lambda: outer, connection)
            await loop.create_connection(lambda: inner, _HOST, port)
        except (OSError, asyncio.CancelledError):
            connection.close()
            if hasattr(outer, "transport"):
                outer.transport.abort()
            visitor.over()
            return
        own = int(inner.transport.get_extra_info("sockname")[1])
        self._visitors[own] = visitor

        def ended() -> None:
            visitor.over()
            for half in (outer, inner):
                half.transport.close()
            if self._visitors.get(own) is visitor:
                del self._visitors[own]

        outer.ended = inner.ended = ended
        outer.heard = partial(visitor.hears, outer)
        visitor.begin([outer, inner])
        for half in (outer, inner):
            half.turn()


def listening(address: str) -> list[socket.socket]:
    """Sockets that listen at all addresses of HOST:PORT, of one port. Raises OSError."""
    host, _, told = address.rpartition(":")
    host, port = host.strip("[]"), int(told)
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():  # noqa: S104 - the owner's choice
        with suppress(OSError):
            return [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)]
    made: list[socket.socket] = []
    for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            own = socket.create_server((place[0], port), family=family, backlog=512)
        except OSError:
            if family == socket.AF_INET6 and made:  # a name that has an address of IPv4 as well
                continue
            for other in made:
                other.close()
            raise
        made.append(own)
        port = int(own.getsockname()[1])
    return made
