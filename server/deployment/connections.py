"""The connections of the front: counted from the moment they are taken, and hurried.

A connection without TLS or a request costs its caller nothing and the front a file. So there is a
bound on all and on those of an address, and where it is reached the one that has waited longest
for a whole request ends. One that was answered waits for the next: it costs its caller as little.
"""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from corolla.host.occupancy import Occupancy, Occupant, network

HANDSHAKE = 10.0
"""Seconds that TLS may take."""
HEAD = 10.0
"""Seconds in which the head of a request must be there: who sends none keeps no connection."""
SHARE = 4
"""One address has at most this part of all connections: several nodes may share it."""
_PAUSE = 0.1
"""Seconds until the next try where a connection cannot be taken."""


class Hurried(H11Protocol):
    """Closes a connection that brings no request in time.

    The timer of uvicorn itself starts after an answer and ends with the next byte.
    """

    occupancy: Occupancy
    occupant: Occupant
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.occupant.end = transport.abort
        self._late = self.loop.call_later(HEAD, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self._in_time()
            self._heard(whole=not self.cycle.more_body)
        elif self._late is None:
            self._late = self.loop.call_later(HEAD, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # begins with the next request, if that has come
        if not self.cycle or self.cycle.response_complete:
            self.occupancy.wait(self.occupant)

    def _heard(self, whole: bool) -> None:
        """A request is there, `whole` or in part: of those that wait, who sends ends last."""
        (self.occupancy.settle if whole else self.occupancy.wait)(self.occupant)

    def connection_lost(self, exc: Exception | None) -> None:
        self.occupancy.leave(self.occupant)
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = None


class CountingServer(uvicorn.Server):
    """Takes connections at `door` itself: uvicorn would count them once TLS is there."""

    def __init__(self, config: uvicorn.Config, door: socket.socket, most: int) -> None:
        """`most`: connections at a time. The protocol of `config` must be Hurried."""
        super().__init__(config)
        self._door, self._most = door, most
        self.occupancy = Occupancy()
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._door.setblocking(False)
        self._run(self._take_all())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await super().shutdown(sockets)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _take_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, (address, *_) = await loop.sock_accept(self._door)
            except OSError:  # too many files
                await asyncio.sleep(_PAUSE)
                continue
            bounds = {network(address): max(1, self._most // SHARE), "": self._most}
            occupant = Occupant(bounds, lambda: None)
            if self.occupancy.enter(occupant):
                occupant.end = self._run(self._secured(connection, occupant)).cancel
                await asyncio.sleep(0)  # it has begun before another may end it
            else:
                connection.close()

    async def _secured(self, connection: socket.socket, occupant: Occupant) -> None:
        """Begin TLS; from then on the connection is that of its protocol."""

        def made() -> Hurried:
            protocol = Hurried(self.config, self.server_state, self.lifespan.state)
            protocol.occupancy, protocol.occupant = self.occupancy, occupant
            return protocol

        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                made, connection, ssl=self.config.ssl, ssl_handshake_timeout=HANDSHAKE
            )
        except OSError:  # no TLS, or not in time
            self.occupancy.leave(occupant)
        except asyncio.CancelledError:
            self.occupancy.leave(occupant)
            raise
