"""Messages between server and client: a protobuf header (proto/update.proto) and a payload.

The same packets travel in process and through Flower. A receiver checks schema, run, round,
version, sizes and checksum before it decodes a payload.

Scalars of seeded directions travel in the header. A scalar group is Params with these tensors:
  scalars     (n,) float32 or float16, n at most 65536;
  directions  (n,) int32, optional: the direction of each scalar in the order of the steps, with
              repeats, each in [0, 65536); without it, scalar i is of direction i;
  seed        () int64 in [0, 2³²), optional;
  step        () float32, finite, optional.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from corolla.errors import SchemaError, WireError
from corolla.host.text import one_line
from corolla.proto import update_pb2 as pb
from corolla.types import Metrics, Params, Payload
from corolla.wire import codec
from corolla.wire.ids import is_hexadecimal
from corolla.wire.limits import (
    MAX_BUNDLE,
    MAX_ERROR,
    MAX_EXAMPLES,
    MAX_HEADER,
    MAX_LOG_SCALARS,
    MAX_METRIC,
    MAX_NAME,
    MAX_REPLY_HEADER,
    MAX_ROWS,
    MAX_SEATS,
)
from corolla.wire.packet import Packet
from corolla.wire.parsing import parse
from corolla.wire.scalar_groups import (
    pack_group,
    pack_groups,
    scalar_bytes,
    split,
    unpack_group,
    unpack_groups,
)

SCHEMA = 3

_LOG_LIMIT = f"at most {MAX_ROWS} of {MAX_LOG_SCALARS}"


class Kind(IntEnum):
    """The kind of a task: what it asks for."""

    HELLO = 1
    TRAIN = 2
    EVALUATE = 3


@dataclass(frozen=True)
class Log:
    """The log of the rounds since a version, one scalar group a round, oldest first.

    Versions are 32 hexadecimal characters. `origin` is that of the start, before any round: base
    model and start adapter; `since` is the one that `rows` continue; `version` the one after the
    last row, which is row `number` of the run, from 1. At most MAX_ROWS rows, of MAX_LOG_SCALARS
    scalars in all when written out dense. `start` is the content id of a snapshot that is sent
    instead of rows.
    """

    origin: str
    since: str
    version: str
    rows: Sequence[Params] = ()
    number: int = 0
    start: str = ""


@dataclass(frozen=True)
class Task:
    """Server → client. `cached` maps every group the client must hold to its content id.

    `scalars` holds scalar groups: they travel in the header. `model_sha256` is of the base model
    that the client must have ("": not checked); `seats`, of a gateway, how many updates it is asked
    for (0: the client's own); `refusal`, in a hello, why the client takes part in nothing ("": it
    may).
    """

    run_id: str
    round: int
    base_version: str
    kind: Kind
    config: str
    cached: Mapping[str, str] = field(default_factory=dict)
    payload: bytes = b""
    scalars: Payload = field(default_factory=dict)
    log: Log | None = None
    model_sha256: str = ""
    seats: int = 0
    refusal: str = ""


@dataclass(frozen=True)
class Capabilities:
    """The capabilities a device states; 0 and "" stand for unknown (see proto/update.proto)."""

    memory_bytes: int = 0
    cores: int = 0
    accelerator: str = ""
    accelerator_bytes: int = 0
    runtime: str = ""
    battery_percent: int = 100
    charging: bool = True
    metered: bool = False
    idle: bool = True
    storage_bytes: int = 0


@dataclass(frozen=True)
class Reply:
    """Client → server. An error has no payload; `missing` names cached groups to send again.

    `scalars` holds scalar groups, at most 1 MiB with the rest of the header. Those of a client
    need not be finite: who folds them in checks.

    Of a gateway: `clients` is how many updates these are (0: the client's own), `bundle` whether
    the payload is a bundle of them (see pack_bundle) or their sum; `seats`, in a hello, how many
    devices it can ask at a time.
    """

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
    scalars: Payload = field(default_factory=dict)
    clients: int = 0
    bundle: bool = False
    seats: int = 0
    model_sha256: str = ""
    capabilities: Capabilities | None = None


def enclose(payload: Payload) -> tuple[bytes, Payload]:
    """Returns the parts of a payload in a message: (dense groups as bytes, scalar groups)."""
    dense, scalars = split(payload)
    return codec.encode(dense) if dense else b"", scalars


def content(message: Task | Reply, max_header: int | None = None) -> Payload:
    """The payload of a message. Raises WireError when its bytes cannot be read.

    Of a bundle there is none: see unpack_bundle. `max_header` is that of codec.decode.
    """
    dense = codec.decode(message.payload, max_header) if message.payload else {}
    twice = dense.keys() & message.scalars.keys()
    if twice:
        raise WireError(f"group {min(twice)!r} is there as tensors and as scalars")
    return {**dense, **message.scalars}


def content_bytes(payload: Payload) -> int:
    """Bytes of the values of a payload, as sent: what the formulas of papers count."""
    dense, scalars = split(payload)
    return codec.content_bytes(dense) + sum(scalar_bytes(params) for params in scalars.values())


def pack_task(task: Task) -> Packet:
    """The packet of a task.

    Raises ValueError when a scalar group is not one, a log has a value that is not finite, or
    there is more of them than a header takes.
    """
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
        scalars=pack_groups(task.scalars),
        log=None if task.log is None else _dump_log(task.log),
        model_sha256=task.model_sha256,
        seats=task.seats,
        refusal=task.refusal[:MAX_ERROR],
    )
    return _pack(header, task.payload, MAX_HEADER)


def unpack_task(packet: Packet) -> Task:
    """The task of a packet. Raises WireError when the header and the payload do not agree."""
    head = pb.Task()
    _parse(head, packet, MAX_HEADER)
    return Task(
        run_id=_hex(head.run_id, 32),
        round=head.round,
        base_version=head.base_version,
        kind=_kind(head.kind),
        config=head.config,
        cached={entry.group: _hex(entry.id, 32) for entry in head.cached},
        payload=packet.payload,
        scalars=unpack_groups(head.scalars),
        log=_load_log(head.log) if head.HasField("log") else None,
        model_sha256=_hex(head.model_sha256, 64) if head.model_sha256 else "",
        seats=_at_most(head.seats, MAX_SEATS, "seats"),
        refusal=one_line(head.refusal),
    )


def pack_reply(reply: Reply) -> Packet:
    """The packet of a reply; metrics that are not finite are left out.

    Raises ValueError when a scalar group is not one, or a header does not take them all.
    """
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
        scalars=pack_groups(reply.scalars),
        clients=reply.clients,
        bundle=reply.bundle,
        seats=reply.seats,
        model_sha256=reply.model_sha256,
        capabilities=pb.Capabilities(**vars(reply.capabilities)) if reply.capabilities else None,
    )
    return _pack(header, reply.payload, MAX_REPLY_HEADER)


def pack_bundle(packets: Sequence[Packet]) -> bytes:
    """Replies of devices behind a gateway, as the payload of its own reply."""
    entries = [pb.Bundle.Entry(header=p.header, payload=p.payload) for p in packets]
    return pb.Bundle(entries=entries).SerializeToString()


def unpack_bundle(data: bytes, most: int) -> list[Packet]:
    """The packets of a bundle, at most `most`: nothing of them is checked. Raises WireError."""
    fewer = {"Bundle.entries": min(most, MAX_BUNDLE)}
    bundle = parse(pb.Bundle(), data, len(data), "bundle", fewer)
    return [Packet(entry.header, entry.payload) for entry in bundle.entries]


def peek_client(packet: Packet) -> str:
    """Returns the client that a reply names, the rest unchecked yet; "" where it names none."""
    try:
        head = parse(pb.Reply(), packet.header[:MAX_REPLY_HEADER], MAX_REPLY_HEADER)
    except WireError:
        return ""
    return head.client if len(head.client) <= MAX_NAME else ""


def unpack_reply(packet: Packet, max_payload: int) -> Reply:
    """The reply of a packet whose payload may have at most `max_payload` bytes.

    Raises WireError when it is too large, or header and payload do not agree. Metrics that are
    not finite or absurd are dropped: they must not cost a round its tensors.
    """
    if len(packet.payload) > max_payload:
        raise WireError(f"payload has {len(packet.payload)} bytes, at most {max_payload}")
    head = pb.Reply()
    _parse(head, packet, MAX_REPLY_HEADER)
    if any(len(name) > MAX_NAME for name in head.metrics):
        raise WireError(f"reply has metrics with names longer than {MAX_NAME} characters")
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
        error=one_line(head.error),
        missing=list(head.missing),
        scalars=unpack_groups(head.scalars),
        clients=_at_most(head.clients, MAX_SEATS, "clients"),
        bundle=head.bundle,
        seats=_at_most(head.seats, MAX_SEATS, "seats"),
        model_sha256=_hex(head.model_sha256, 64) if head.model_sha256 else "",
        capabilities=(
            load_capabilities(head.capabilities) if head.HasField("capabilities") else None
        ),
    )


def load_capabilities(told: pb.Capabilities) -> Capabilities:
    """Returns the capabilities that a device states, fit for a log."""
    return Capabilities(
        memory_bytes=told.memory_bytes,
        cores=told.cores,
        accelerator=one_line(told.accelerator[:MAX_NAME]),
        accelerator_bytes=told.accelerator_bytes,
        runtime=one_line(told.runtime[:MAX_NAME]),
        battery_percent=min(told.battery_percent, 100),
        charging=told.charging,
        metered=told.metered,
        idle=told.idle,
        storage_bytes=told.storage_bytes,
    )


def _pack(head: pb.Task | pb.Reply, payload: bytes, limit: int) -> Packet:
    header = head.SerializeToString()
    if len(header) > limit:
        raise ValueError(f"header has {len(header)} bytes, at most {limit}")
    return Packet(header, payload)


def _parse(head: pb.Task | pb.Reply, packet: Packet, limit: int) -> None:
    parse(head, packet.header, limit, "header")
    if head.schema != SCHEMA:
        raise SchemaError(f"message has schema {head.schema}, this version reads {SCHEMA}")
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
    if not is_hexadecimal(text, length, length):
        raise WireError(f"id of {len(text)} characters is not {length} hexadecimal ones")
    return text


def _at_most(value: int, most: int, what: str) -> int:
    if value > most:
        raise WireError(f"message has {value} {what}, at most {most}")
    return value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _dump_log(log: Log) -> pb.Log:
    rows = [pack_group(row) for row in log.rows]
    total = sum(row.size for row in rows)
    if len(rows) > MAX_ROWS or total > MAX_LOG_SCALARS:
        raise ValueError(f"log has {len(rows)} rows of {total} scalars: {_LOG_LIMIT}")
    for number, row in enumerate(log.rows):
        if not row["scalars"].isfinite().all():
            raise ValueError(f"log row {number} has a value that is not finite")
    return pb.Log(
        origin=log.origin,
        since=log.since,
        version=log.version,
        rows=rows,
        number=log.number,
        start=log.start,
    )


def _load_log(log: pb.Log) -> Log:
    total = sum(row.size for row in log.rows)
    if len(log.rows) > MAX_ROWS or total > MAX_LOG_SCALARS:
        raise WireError(f"log has {len(log.rows)} rows of {total} scalars: {_LOG_LIMIT}")
    rows = []
    for number, entry in enumerate(log.rows):
        where = f"log row {number}"
        if entry.group:
            raise WireError(f"{where} has the name of a group")
        row = unpack_group(entry, where)
        if not np.isfinite(row["scalars"].numpy()).all():
            raise WireError(f"{where} has a value that is not finite")
        rows.append(row)
    if log.number < len(rows):
        raise WireError(f"log ends at row {log.number} and has {len(rows)} rows")
    ids = (_hex(log.origin, 32), _hex(log.since, 32), _hex(log.version, 32))
    return Log(*ids, rows, log.number, _hex(log.start, 32) if log.start else "")
