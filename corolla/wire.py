"""Messages between server and client: a protobuf header (proto/update.proto) and a payload.

The same packets travel in process and through Flower. A receiver checks schema, run, round,
version, sizes and checksum before it decodes a payload.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.types import Metrics

if TYPE_CHECKING:
    from flwr.app import RecordDict

SCHEMA = 1
MAX_HEADER = 1 << 20
MAX_CACHED = 4096
MAX_METRICS = 256
MAX_METRIC = 1e30
MAX_NAME = 128
MAX_ERROR = 2000
MAX_EXAMPLES = 1 << 40


class Kind(IntEnum):
    """What a task asks for."""

    HELLO = 1
    TRAIN = 2
    EVALUATE = 3


@dataclass(frozen=True)
class Packet:
    """One message as bytes."""

    header: bytes
    payload: bytes


@dataclass(frozen=True)
class Task:
    """Server → client. `cached` maps every group the client must hold to its content id."""

    run_id: str
    round: int
    base_version: str
    kind: Kind
    config: str
    cached: Mapping[str, str] = field(default_factory=dict)
    payload: bytes = b""


@dataclass(frozen=True)
class Reply:
    """Client → server. An error has no payload; `missing` names cached groups to send again."""

    run_id: str
    round: int
    base_version: str
    kind: Kind
    client: str
    num_examples: int = 0
    metrics: Metrics = field(default_factory=dict)
    payload: bytes = b""
    error: str = ""
    missing: Sequence[str] = ()


def pack_task(task: Task) -> Packet:
    """The packet of a task."""
    header = pb.Task(
        schema=SCHEMA,
        run_id=task.run_id,
        round=task.round,
        base_version=task.base_version,
        kind=pb.Kind.Name(task.kind),
        config=task.config,
        payload_bytes=len(task.payload),
        payload_sha256=_sha256(task.payload),
        cached=[pb.CachedGroup(group=g, id=i) for g, i in task.cached.items()],
    )
    return Packet(header.SerializeToString(), task.payload)


def unpack_task(packet: Packet) -> Task:
    """The task of a packet. Raises WireError when the header and the payload do not agree."""
    head = pb.Task()
    _parse(head, packet)
    if len(head.cached) > MAX_CACHED:
        raise WireError(f"task names {len(head.cached)} cached groups, at most {MAX_CACHED}")
    return Task(
        run_id=_hex(head.run_id, 32),
        round=head.round,
        base_version=head.base_version,
        kind=_kind(head.kind),
        config=head.config,
        cached={entry.group: _hex(entry.id, 32) for entry in head.cached},
        payload=packet.payload,
    )


def pack_reply(reply: Reply) -> Packet:
    """The packet of a reply; metrics that are not finite are left out."""
    header = pb.Reply(
        schema=SCHEMA,
        run_id=reply.run_id,
        round=reply.round,
        base_version=reply.base_version,
        kind=pb.Kind.Name(reply.kind),
        client=reply.client,
        num_examples=reply.num_examples,
        metrics={k: float(v) for k, v in reply.metrics.items() if math.isfinite(v)},
        payload_bytes=len(reply.payload),
        payload_sha256=_sha256(reply.payload),
        error=reply.error[:MAX_ERROR],
        missing=reply.missing,
    )
    return Packet(header.SerializeToString(), reply.payload)


def unpack_reply(packet: Packet, max_payload: int) -> Reply:
    """The reply of a packet whose payload may have at most `max_payload` bytes.

    Raises WireError when it is too large, or header and payload do not agree. Metrics that are
    not finite or absurd are dropped: they must not cost a round its tensors.
    """
    if len(packet.payload) > max_payload:
        raise WireError(f"payload has {len(packet.payload)} bytes, at most {max_payload}")
    head = pb.Reply()
    _parse(head, packet)
    if len(head.metrics) > MAX_METRICS or any(len(name) > MAX_NAME for name in head.metrics):
        raise WireError(f"reply has {len(head.metrics)} metrics, at most {MAX_METRICS}")
    if head.num_examples > MAX_EXAMPLES:
        raise WireError(f"reply claims {head.num_examples} examples")
    return Reply(
        run_id=head.run_id,
        round=head.round,
        base_version=head.base_version,
        kind=_kind(head.kind),
        client=head.client,
        num_examples=head.num_examples,
        # NaN fails the comparison too.
        metrics={name: value for name, value in head.metrics.items() if abs(value) <= MAX_METRIC},
        payload=packet.payload,
        error=_one_line(head.error),
        missing=list(head.missing[:MAX_CACHED]),
    )


def to_flower(packet: Packet) -> "RecordDict":
    """A packet as Flower records: one array for all, because each array costs two objects."""
    # Imported here because Flower takes a second to import and in-process runs do not need it.
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    records = RecordDict({"header": ConfigRecord({"packet": packet.header})})
    if packet.payload:
        array = Array(np.frombuffer(packet.payload, dtype=np.uint8))
        records["payload"] = ArrayRecord({"packet": array})
    return records


def from_flower(records: "RecordDict", max_payload: int) -> Packet:
    """The packet of Flower records. Raises WireError when they hold anything else."""
    try:
        header = records.config_records["header"]["packet"]
        payload = b""
        if "payload" in records.array_records:
            array = records.array_records["payload"]["packet"]
            if len(array.data) > max_payload + 1024:  # the npy header
                raise WireError(f"payload has {len(array.data)} bytes, at most {max_payload}")
            payload = _npy_bytes(array.data)
    except (KeyError, TypeError, AttributeError) as error:
        raise WireError(f"not a packet: {error!r}") from error
    if not isinstance(header, bytes):
        raise WireError(f"header is {type(header).__name__}, not bytes")
    return Packet(header, payload)


def _npy_bytes(data: bytes) -> bytes:
    """The bytes in a .npy file of uint8. Only that exact header is taken: nothing is parsed.

    Parsers of array files raise a dozen unrelated errors on hostile input and allocate what a
    header claims.
    """
    content = data[128:]
    shape = f"({len(content)},)"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    expected = b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"
    if data[:128] != expected:
        raise WireError("payload is not an array of bytes")
    return content


def _one_line(text: str) -> str:
    """What a peer says, fit for a terminal and a log: printable, one line, bounded."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:MAX_ERROR]).split())


def _parse(head: pb.Task | pb.Reply, packet: Packet) -> None:
    if len(packet.header) > MAX_HEADER:
        raise WireError(f"header has {len(packet.header)} bytes, at most {MAX_HEADER}")
    try:
        head.ParseFromString(packet.header)
    except DecodeError as error:
        raise WireError("header cannot be parsed") from error
    if head.schema != SCHEMA:
        raise WireError(f"message has schema {head.schema}, this version reads {SCHEMA}")
    if head.payload_bytes != len(packet.payload):
        raise WireError(f"payload has {len(packet.payload)} bytes, header {head.payload_bytes}")
    if head.payload_sha256 != _sha256(packet.payload):
        raise WireError("payload does not match its checksum")


def _kind(value: int) -> Kind:
    try:
        return Kind(value)
    except ValueError as error:
        raise WireError(f"unknown kind of message {value}") from error


def _hex(text: str, length: int) -> str:
    """Ids become file names on the device: nothing but hexadecimal characters passes."""
    if len(text) != length or not all(c in "0123456789abcdef" for c in text):
        raise WireError(f"id of {len(text)} characters is not {length} hexadecimal ones")
    return text


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
