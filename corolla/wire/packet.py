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
