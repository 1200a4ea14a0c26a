"""One message as bytes, and as records of Flower. Imports no torch: a thin ClientApp carries it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.errors import WireError

if TYPE_CHECKING:
    from flwr.app import RecordDict


@dataclass(frozen=True)
class Packet:
    """A header (proto/update.proto) and a payload (safetensors, or a bundle of packets)."""

    header: bytes
    payload: bytes


def check_count(data: bytes, most: int) -> None:
    """Raises WireError for a protobuf message with more than `most` fields, repeated ones included.

    An empty entry of a repeated field takes 2 bytes here and 60 once it is parsed. What is no
    message at all is left to the parser.
    """
    at = 0
    for count in range(len(data)):
        if at >= len(data):
            return
        if count == most:
            raise WireError(f"message has more than {most} entries")
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(data, at)
                at += length
            case 5:
                at += 4
            case _:
                raise WireError("message cannot be parsed")


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
