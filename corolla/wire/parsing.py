"""Protobuf messages of peers, counted before they are parsed. Imports no torch.

An empty entry of a repeated field takes 2 bytes on the wire and 60 once it is parsed: a peer could
make a message of 8 MiB take 250. Every repeated field has its limit here.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from corolla.errors import WireError
from corolla.wire.limits import (
    MAX_BUNDLE,
    MAX_CACHED,
    MAX_FILES,
    MAX_GROUPS,
    MAX_METRICS,
    MAX_ROWS,
    MAX_TOLD,
)

MOST: Mapping[str, int] = {
    "Task.cached": MAX_CACHED,
    "Task.scalars": MAX_GROUPS,
    "Log.rows": MAX_ROWS,
    "Reply.metrics": MAX_METRICS,
    "Reply.missing": MAX_CACHED,
    "Reply.scalars": MAX_GROUPS,
    "Bundle.entries": MAX_BUNDLE,
    "Lease.cached": MAX_CACHED,
    "Manifest.files": MAX_FILES,
    "Native.methods": MAX_TOLD,
    "Native.strategies": MAX_TOLD,
    "Native.timings": MAX_TOLD,
}
"""Repeated fields and maps of proto/, by message and field → entries of a whole message, at most.

Entries of the first kind hold no repeated fields of their own, which would be counted together.
"""
_SINGLE = 1024
"""Fields of a message that are not repeated, or not known here: those of a newer version."""

M = TypeVar("M", bound=Message)


def parse(
    message: M,
    data: bytes,
    most: int,
    what: str = "message",
    fewer: Mapping[str, int] | None = None,
) -> M:
    """Fill a message of at most `most` bytes; errors begin with `what` it is.

    `fewer` are lower limits than MOST has, by the same names. Raises WireError when it is too long,
    has more entries than are allowed, or is none.
    """
    if len(data) > most:
        raise WireError(f"{what} has {len(data)} bytes, at most {most}")
    count = _Count({**MOST, **(fewer or {})}, message.DESCRIPTOR, what)
    count.count(data, 0, len(data))
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"{what} cannot be parsed") from error
    return message


class _Count:
    """Counts the entries of one message, those of messages within it included."""

    def __init__(self, limits: Mapping[str, int], kind: Any, what: str) -> None:
        self._limits, self._kind, self._what = limits, kind, what
        self._entries: dict[str, int] = {}
        self._fields = _SINGLE + sum(limits[name] for name in _names(kind))

    def count(self, data: bytes, at: int, end: int, kind: Any = None) -> None:
        """Raises WireError for more entries than are allowed; no message is the parser's affair."""
        known = _fields(kind or self._kind)
        while at < end:
            tag, at = _varint(data, at)
            field = known.get(tag >> 3)
            self._count(field)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at)
                case 1:
                    at += 8
                case 2:
                    length, at = _varint(data, at)
                    within = field.message_type if field else None
                    if within and _names(within) and at + length <= end:
                        self.count(data, at, at + length, within)
                    at += length
                case 5:
                    at += 4
                case _:
                    raise WireError(f"{self._what} cannot be parsed")

    def _count(self, field: FieldDescriptor | None) -> None:
        self._fields -= 1
        if self._fields < 0:
            raise WireError(f"{self._what} has more fields than {self._kind.name} may have")
        if field and field.is_repeated:
            name = _name(field)
            self._entries[name] = entries = self._entries.get(name, 0) + 1
            if entries > self._limits[name]:
                raise WireError(
                    f"{self._what} has more than {self._limits[name]} entries of {name}"
                )


@cache
def _fields(kind: Descriptor) -> Mapping[int, FieldDescriptor]:
    return dict(kind.fields_by_number)


@cache
def _name(field: FieldDescriptor) -> str:
    return ".".join(field.full_name.split(".")[-2:])


@cache
def _names(kind: Descriptor) -> frozenset[str]:
    """Names of the repeated fields of a message and of those within it."""
    found: set[str] = set()
    for field in kind.fields:
        if field.is_repeated:
            found.add(_name(field))
        if field.message_type:
            found |= _names(field.message_type)
    return frozenset(found)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; 0 beyond the end of the data."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at] if at < len(data) else 0
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            break
    return value, at
