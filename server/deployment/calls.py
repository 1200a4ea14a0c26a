"""Calls of a Flower Grid that go on when its SuperLink is away for a while."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from corolla.errors import StoppedError, WireError
from corolla.host import logs
from corolla.server.deployment.limits import Limits
from corolla.server.deployment.pulling import bound
from corolla.wire.packet import Packet, to_flower

POLL = 0.2
AWAY = 1.0
"""Seconds between calls of a SuperLink that is away."""

_log = logs.logger("grid")
_T = TypeVar("_T")


class Calls:
    """The calls that a round makes: each is tried until its deadline, and ended by `stop`."""

    def __init__(
        self,
        grid: Grid,
        stop: threading.Event,
        limits: Limits | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits` are those of replies; None: any."""
        self._grid, self._stop, self._clock = grid, stop, clock
        self._limits = limits or Limits()
        self.bounded = bound(grid, stop) if limits else None
        invoker = getattr(grid, "_retry_invoker", None)
        if invoker is not None:  # Flower would try for ever and in its own time: we have a deadline
            invoker.max_tries = 1
        self._poll = POLL if invoker else POLL / 4  # a call over TLS, or in this process

    def nodes(self) -> dict[int, bytes]:
        """Nodes that are online → their keys; none while the SuperLink is away."""
        infos: list[NodeInfo] = self._call(lambda: list(self._grid.get_nodes()), [])
        return {int(info.node_id): bytes(info.public_key) for info in infos}

    def push(self, messages: list[Message], deadline: float) -> set[str]:
        """Ids of the messages that the SuperLink has taken; tried until the deadline.

        A message that is sent twice, because the answer to the first call was lost, is answered
        with its id again; one that is refused, as to a node that has left, has none.
        """
        while True:
            ids = self._call(lambda: list(self._grid.push_messages(messages)), None)
            if ids is not None:
                return {str(i) for i in ids if i}
            if self._clock() > deadline:
                return set()
            self.pause(AWAY)

    def pull(self, ids: Mapping[str, int]) -> Iterator[tuple[str, Message | WireError]]:
        """Yields replies to messages (id → seats of the member asked): (id, reply or error).

        One by one: the SuperLink forgets what it has handed over, also when it dies before the rest
        arrives. Whatever Flower cannot read is the error of who has sent it.
        """
        away: Exception | None = None
        for sent, seats in ids.items():
            if self._stop.is_set():
                raise StoppedError("stopped")
            if self.bounded:
                self.bounded.most = self._limits.reply(seats)
            try:
                messages = list(self._grid.pull_messages([sent]))
            except httpx.HTTPStatusError as error:  # of this message, it may be: others are heard
                away = error
            except (httpx.HTTPError, OSError) as error:
                away = error
                break
            except StoppedError:
                raise
            except WireError as error:
                yield sent, error
            except Exception as error:  # noqa: BLE001 - it depends on a client's bytes
                yield sent, WireError(f"not a packet: Flower raised {type(error).__name__}")
            else:
                yield from ((sent, message) for message in messages[:1])
        if away:
            self._away(away)

    def _call(self, what: Callable[[], _T], otherwise: _T) -> _T:
        """A call of the Grid; `otherwise` when the SuperLink is away."""
        try:
            return what()
        except (httpx.HTTPError, OSError) as error:
            self._away(error)
            return otherwise

    def _away(self, error: Exception) -> None:
        _log.warning("the SuperLink is away", why=repr(error))
        self.pause(AWAY)

    def pause(self, seconds: float = 0.0) -> None:
        if self._stop.wait(seconds or self._poll):
            raise StoppedError("stopped")


def addressed(node: int, packet: Packet, ttl: float) -> Message:
    """The message of Flower that brings a packet to a node, within `ttl` seconds."""
    return Message(to_flower(packet), node, "train", ttl=ttl)
