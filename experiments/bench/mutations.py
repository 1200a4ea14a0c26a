"""How bytes go wrong: mutations of messages, of payloads, and of the JSON inside them.

Every function draws from a `random.Random` and knows nothing of who reads the result. Half of the
mutations keep the format, so that they get past its parser; the others break it.
"""

import hashlib
import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from corolla.proto import update_pb2 as pb
from corolla.wire.packet import Packet

INTEGERS = [0, 1, 2, 3, -1, -15, 127, 255, 256, 65535, 65536, 10**12]
INTEGERS += [
    sign * 2**power + one for power in (31, 32, 53, 63, 64) for sign in (1, -1) for one in (-1, 0)
]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e6, 1.1e6, 1e30, 3.5e38, 1.7e308]
FLOATS += [math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "\0",
    "\n",
    "x" * 200,
    "x" * 5000,
    "../../etc/passwd",
    "é",
    "日本",
    "\u202e",
    "a/b",
    "'",
]
TEXTS += [
    '"',
    "\\",
    "ada",
    "ben",
    "ada/p1",
    "0" * 32,
    "f" * 64,
    "A" * 32,
    "null",
    "scalars",
    "adapter",
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U8", "BOOL", "C64"]
DTYPES += ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "<f4", ">f4", "object", "", "f32"]

REPLY, TASK = pb.Reply, pb.Task
_SCALAR_TYPES: dict[str, list[Any]] = {"float": FLOATS, "int": INTEGERS, "str": TEXTS}


def reply(rng: random.Random, packet: Packet) -> Packet:
    """A mutated reply; mostly with the checksum that belongs to it."""
    return _message(rng, packet, pb.Reply)


def task(rng: random.Random, packet: Packet) -> Packet:
    """A mutated task; mostly with the checksum that belongs to it."""
    if rng.random() < 0.3:
        head = pb.Task.FromString(packet.header)
        head.config = settings(rng, head.config)
        packet = Packet(head.SerializeToString(), packet.payload)
        if rng.random() < 0.7:
            return packet
    return _message(rng, packet, pb.Task)


def _message(rng: random.Random, packet: Packet, kind: Any) -> Packet:
    header, body = packet.header, packet.payload
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        choice = rng.random()
        if choice < 0.5 and body:
            body = payload(rng, body)
        elif choice < 0.85:
            header = message(rng, header, kind)
        else:
            header = raw(rng, header)
    if rng.random() < 0.9:
        header = sealed(header, body, kind)
    return Packet(header, body)


def sealed(header: bytes, body: bytes, kind: Any) -> bytes:
    """The header with the length and the checksum of a payload, where it can be read."""
    try:
        head = kind.FromString(header)
        head.payload_bytes, head.payload_sha256 = len(body), hashlib.sha256(body).hexdigest()
        return bytes(head.SerializeToString())
    except DecodeError:
        return header


def message(rng: random.Random, data: bytes, kind: Any) -> bytes:
    """Bytes of a message of which one field, at any depth, has another value."""
    try:
        found = kind.FromString(data)
    except DecodeError:
        return raw(rng, data)
    _field(rng, found)
    return bytes(found.SerializeToString())


def _field(rng: random.Random, found: Any) -> None:
    field = rng.choice(found.DESCRIPTOR.fields)
    value = getattr(found, field.name)
    if hasattr(value, "add"):  # repeated messages
        for _ in range(rng.choice((1, 1, 2, 70))):
            new = value.add()
            if len(value) > 1 and rng.random() < 0.7:
                new.CopyFrom(value[0])
        _field(rng, rng.choice(value))
        if rng.random() < 0.3:
            del value[0]
    elif hasattr(value, "DESCRIPTOR"):
        _field(rng, value)
    elif hasattr(value, "keys"):
        for _ in range(rng.choice((1, 1, 1, 300))):
            value[rng.choice(TEXTS) + rng.choice(("", str(rng.random())))] = rng.choice(FLOATS)
    elif hasattr(value, "append"):
        value.extend([rng.choice(TEXTS)[:200]] * rng.choice((1, 1, 9000)))
    elif isinstance(value, bytes):
        change = rng.choice((raw, _numbers)) if value else raw
        setattr(found, field.name, change(rng, value))
    else:
        _assign(rng, found, field.name, value)


def _assign(rng: random.Random, found: Any, name: str, value: Any) -> None:
    kind = type(value).__name__
    if kind == "bool":
        setattr(found, name, not value)
        return
    for _ in range(9):
        try:
            setattr(found, name, rng.choice(_SCALAR_TYPES.get(kind, INTEGERS)))
            return
        except (ValueError, TypeError):  # out of the range of its type
            continue


def raw(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are flipped, cut, repeated, inserted, or made up."""
    found = bytearray(data)
    at = rng.randrange(len(found) + 1)
    size = rng.choice((1, 1, 2, 8, 100))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 9))):
                if found:
                    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + size]
        case 3:
            found[at:at] = rng.randbytes(size)
        case 4:
            found[at : at + size] = bytes([rng.choice((0, 127, 128, 255))]) * size
        case 5:
            found[at:at] = found[rng.randrange(len(found) + 1) :][: 10 * size]
        case 6:
            found = bytearray(rng.randbytes(rng.choice((0, 1, 8, 60))))
    return bytes(found)


def payload(rng: random.Random, data: bytes) -> bytes:
    """A mutated safetensors buffer: its values, header or bytes, or another file altogether."""
    return rng.choices((values, header, raw, other), (6, 4, 1, 1))[0](rng, data)


def values(rng: random.Random, data: bytes) -> bytes:
    """Some values behind the header become others: not finite, huge, or of another scale."""
    at = 8 + int.from_bytes(data[:8], "little")
    if len(data) - at < 8:
        return raw(rng, data)
    return data[:at] + _numbers(rng, data[at:])


def _numbers(rng: random.Random, data: bytes) -> bytes:
    kind: np.dtype[Any] = np.dtype(rng.choice(("f4", "f4", "f2", "f8")))
    size = len(data) // kind.itemsize
    found = np.frombuffer(data, kind, size).copy()
    if not size:
        return raw(rng, data)
    with np.errstate(all="ignore"):
        if rng.random() < 0.5:
            found[rng.randrange(size)] = rng.choice(FLOATS)
        else:
            factor = rng.choice((0.0, -1.0, 0.5, 1.01, 1.29, 2.0, 10.0, 1e3, 1e10, 1e38))
            found = (found * factor).astype(kind)
    return found.tobytes() + data[found.nbytes :]


def header(rng: random.Random, data: bytes) -> bytes:
    """The JSON before the tensors says something else of them."""
    length = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + length])
        if not (names := [name for name in found if name != "__metadata__"]):
            return raw(rng, data)
        name = rng.choice(names)
        entry = found[name]
        match rng.randrange(10):
            case 0:
                entry["dtype"] = rng.choice(DTYPES)
            case 1:
                entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], []))
            case 2:
                entry["shape"] = [rng.choice(INTEGERS) for _ in range(rng.randrange(5))]
            case 3:
                entry["data_offsets"] = [rng.choice(INTEGERS), rng.choice(INTEGERS)]
            case 4:
                found[name], found[rng.choice(names)] = found[rng.choice(names)], entry
            case 5:
                found[rng.choice(TEXTS)] = found.pop(name)
            case 6:
                del found[name]
            case 7:
                groups = found["__metadata__"]["groups"]
                found["__metadata__"]["groups"] = settings(rng, groups)
            case 8:
                found = _json(rng, found)
            case 9:
                order = sorted(found, reverse=True)
                found = {key: found[key] for key in order}
        text = json.dumps(found).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return raw(rng, data)
    if rng.random() < 0.05:
        text = rng.choice((b"[" * 30_000, text + b" " * 100_000, text[:-3], b'{"a":' * 5000))
    size = rng.choice(INTEGERS) % 2**64 if rng.random() < 0.05 else len(text)
    return struct.pack("<Q", size) + text + data[8 + length :]


def settings(rng: random.Random, text: str) -> str:
    """JSON of which one value, at any depth, is another."""
    if rng.random() < 0.02:
        return rng.choice(("[" * 100_000, '{"lora":' * 5000, "1" * 5000, "NaN", text * 2))
    try:
        return json.dumps(_json(rng, json.loads(text)))
    except (ValueError, RecursionError):
        return raw(rng, text.encode()).decode(errors="replace")


def _json(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {key: own for key, own in value.items() if key != name}
        return {**value, name: _json(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _json(rng, value[at]), *value[at + 1 :]]
    nested: Any = 1
    for _ in range(rng.choice((1, 500))):
        nested = [nested]
    numbers = [rng.choice(INTEGERS), rng.choice(FLOATS), 10**400, 0]
    return rng.choice([*numbers, rng.choice(TEXTS), "\ud800", None, True, {}, nested])


def other(rng: random.Random, data: bytes) -> bytes:
    """Another file format, or what claims to be one."""
    return rng.choice(_OTHERS)(data)


def npy(shape: str, data: bytes = b"") -> bytes:
    """A .npy file of numbers whose header claims a shape."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _npz(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        named = zipfile.ZipInfo("a.npy", (2026, 1, 1, 0, 0, 0))  # not now: a seed gives its bytes
        archive.writestr(named, npy("(3,)", bytes(12)), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


_BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
_OTHERS: list[Callable[[bytes], bytes]] = [
    lambda data: npy("(1099511627776,)", data),
    lambda data: npy("(268435456,)", data),
    lambda data: npy("(3,)", npy("(3,)", data)),
    _npz,
    lambda data: b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    lambda data: zstandard.ZstdCompressor().compress(data),
    lambda data: _BOMB,
    lambda data: data + data,
    lambda data: data * 40,
    lambda data: b"",
]
