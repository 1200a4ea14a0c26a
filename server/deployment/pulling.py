"""Bytes that Flower pulls, counted before it makes objects of them.

The memory that these take is the server's, not a client's.

A reply travels as a tree of objects, and an array may name one chunk of its bytes again and again.
Flower (1.41, whose names these are) inflates all of it before anybody can look at the reply.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from corolla.errors import StoppedError, WireError
from corolla.wire import limits

_OBJECTS = 1000
_CHUNK = 1 << 20
"""Bytes of a chunk of an array, at least; Flower's have 5 MiB."""
_RECORDS = limits.MAX_REPLY_HEADER + (1 << 18)
"""Bytes of all objects but chunks: the header of a reply, and names."""
_CHILD = 128
"""Bytes in which an object names one of its children: 64 hexadecimal digits and a number."""
STALLED = 120.0
"""Seconds without an object that is still to be uploaded; nobody else is heard meanwhile."""


@dataclass
class Count:
    """Counts the bytes of the objects of one reply; its arrays may have `most`."""

    most: int
    records: int = 0
    chunks: int = 0
    largest: int = 0
    named: int = 0
    """How often arrays name a chunk."""
    since: float = field(default_factory=time.monotonic)
    """When the last object came."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_tree(self, tree: Any) -> None:
        """Raises WireError for a tree of too many objects, before one is pulled."""
        most = _OBJECTS + self.most // _CHUNK
        if sum(1 for _ in islice(_nodes(tree), most + 1)) > most:
            raise WireError(f"reply has more than {most} objects")

    def add(self, content: bytes) -> None:
        """Raises WireError when there is too much with this object; ValueError for none at all.

        An object is "<type> <children> <length>", a zero byte, and its body.
        """
        head, _, body = content.partition(b"\x00")
        with self._lock:
            self.since = time.monotonic()
            if head.startswith(b"ArrayChunk "):
                self.chunks += len(body)
                self.largest = max(self.largest, len(body))
            else:
                self.records += len(content)
            if self.records > _RECORDS + _CHILD * (_OBJECTS + self.most // _CHUNK):
                raise WireError("reply has too large records")
            if head.startswith(b"Array "):
                self.named += len(json.loads(body)["arraychunk_ids"])
            if max(self.chunks, self.named * self.largest) > self.most:
                raise WireError(f"reply has arrays of more than {self.most} bytes")


class Bounded:
    """A client of Flower's Runtime API that pulls `most` bytes of arrays with each message."""

    def __init__(self, client: Any, stop: threading.Event) -> None:
        self._client, self._stop = client, stop
        self.most = 0
        self._count = Count(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - a name of Flower
        """Replies to the messages of a request, and the trees of their objects."""
        self._count = Count(self.most)
        response = self._client.PullMessages(request)
        for i in reversed(range(len(response.messages_list))):  # a node may send what it likes
            if response.messages_list[i].metadata.reply_to_message_id not in request.message_ids:
                del response.messages_list[i], response.message_object_trees[i]
        for tree in response.message_object_trees:
            self._count.check_tree(tree)
        return response

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - a name of Flower
        """One object; called from several threads, some of which outlive a reply that failed."""
        count = self._count
        response = self._client.PullObject(request)
        if response.object_available:
            count.add(response.object_content)
        elif self._stop.is_set():
            raise StoppedError("stopped")
        elif time.monotonic() - count.since > STALLED:
            raise WireError(f"the rest of a reply has not come for {STALLED:.0f} seconds")
        return response


def bound(grid: Any, stop: threading.Event) -> Bounded | None:
    """Count all that this Grid pulls; None: it holds objects of this process (a simulation)."""
    if not hasattr(grid, "_runtime_client"):
        return None
    grid._client = bounded = Bounded(grid._runtime_client, stop)
    return bounded


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for child in tree.children:
        yield from _nodes(child)
