"""Messages between phones and gateways (proto/device.proto): their limits, read in one place.

Imports no torch: a phone's protocol runs where there is none.
"""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from corolla.errors import ConfigError, WireError
from corolla.host.text import one_line
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2 as updates
from corolla.wire.ids import is_hexadecimal
from corolla.wire.limits import MAX_FILES
from corolla.wire.packet import Packet
from corolla.wire.parsing import parse

PROTOCOL = 1
CHUNK = 1 << 20
INLINE = 1 << 16
MAX_MESSAGE = 2 << 20
MAX_CHUNKS = 1 << 16
MAX_TASK = 8 << 20
MAX_REPLY = 1 << 20
MAX_MANIFEST = 64 << 20
MAX_TEXT = 300
NOTE = "corolla-manifest.json"
"""The name of the file that a phone writes beside a base model's files: it is never offered."""

_DEVICE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def check_device(name: str) -> str:
    """A device's name, if it is one. Raises WireError."""
    if not _DEVICE.fullmatch(name):
        raise WireError("a device's name has 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return name


def check_address(option: str, text: str) -> str:
    """A HOST:PORT that a user gave. Raises ConfigError, which names the option."""
    found = _ADDRESS.fullmatch(text)
    if not found or not int(found[1]) < 65536:
        raise ConfigError(f"{option}: expected HOST:PORT, without https://; found {text!r}")
    return text


def check_sha256(text: str) -> str:
    """The name of a blob, if it is one: it becomes a file's name. Raises WireError."""
    if not is_hexadecimal(text, 64, 64):
        raise WireError("a blob is named by 64 hexadecimal characters")
    return text


def check_id(text: str) -> str:
    """The id of a lease or of a version, if it is one. Raises WireError."""
    if not is_hexadecimal(text, 32, 32):
        raise WireError("an id has 32 hexadecimal characters")
    return text


def sha256(data: bytes) -> str:
    """64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def chunk(content: bytes, offset: int, size: int, lease: str = "") -> pb.Chunk:
    """A piece of something of `size` bytes, with its checksum."""
    crc32 = zlib.crc32(content)
    return pb.Chunk(lease=lease, offset=offset, content=content, crc32=crc32, size=size)


def check_chunk(found: pb.Chunk, offset: int, size: int) -> bytes:
    """The content of the piece at `offset`. Raises WireError when it is another or damaged."""
    if (found.offset, found.size) != (offset, size):
        raise WireError(f"chunk is of {found.offset} in {found.size}, not of {offset} in {size}")
    expected = min(CHUNK, size - offset)
    if not 0 < len(found.content) <= expected:
        raise WireError(f"chunk has {len(found.content)} bytes, at most {expected}")
    if zlib.crc32(found.content) != found.crc32:
        raise WireError("chunk does not match its checksum")
    return found.content


def check_blob(blob: pb.Blob, most: int) -> pb.Blob:
    """Returns the announced blob if it keeps the limits. Raises WireError."""
    if blob.size > most:
        raise WireError(f"blob has {blob.size} bytes, at most {most}")
    if blob.size:
        check_sha256(blob.sha256)
    if blob.inline and (len(blob.inline) != blob.size or sha256(blob.inline) != blob.sha256):
        raise WireError("blob does not match its checksum")
    return blob


def read_manifest(data: bytes, suffixes: Collection[str] | None = None) -> pb.Manifest:
    """The manifest of a base model, or of files with other `suffixes`.

    Raises WireError for limits broken and paths that lead out.
    """
    manifest = parse(pb.Manifest(), data, MAX_MANIFEST)
    if not 0 < len(manifest.files) <= MAX_FILES:
        raise WireError(f"manifest has {len(manifest.files)} files, not 1 to {MAX_FILES}")
    for file in manifest.files:
        check_path(file.path, MODEL_FILES if suffixes is None else suffixes)
        check_blob(file.blob, MAX_CHUNKS * CHUNK)
        if len(file.chunks) != 32 * -(-file.blob.size // CHUNK):
            raise WireError(f"manifest does not name the chunks of {file.path}")
    if len({file.path for file in manifest.files}) != len(manifest.files):
        raise WireError("manifest names a file twice")
    return manifest


MODEL_FILES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
"""Suffixes of files that belong to a base model and cannot run code when they are loaded."""
PROGRAM_FILES = frozenset({".json", ".sig", ".pte", ".ptd"})
"""Suffixes of files of a bundle's program: for native clients, which check the signature."""


def check_path(path: str, suffixes: Collection[str] = MODEL_FILES) -> PurePosixPath:
    """A model's file, as a path that stays in its folder. Raises WireError."""
    parts = path.split("/")
    if (
        len(path) > 200
        or any(not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part) for part in parts)
        or PurePosixPath(path).suffix not in suffixes
    ):
        raise WireError(f"{one_line(path, MAX_TEXT)!r} is no file of a model")
    return PurePosixPath(path)


# --- a phone's half of a task ---------------------------------------------------------------------


def read_task(header: bytes) -> updates.Task:
    """The header of a task. Its payload is checked by who trains. Raises WireError."""
    return parse(updates.Task(), header, MAX_TASK)


def with_groups(task: updates.Task, payload: bytes, groups: Sequence[bytes]) -> Packet:
    """The packet of a task with cached groups beside its payload. Raises WireError."""
    whole = join([payload, *groups] if payload else groups) if groups else payload
    head = updates.Task()
    head.CopyFrom(task)
    head.payload_bytes, head.payload_sha256 = len(whole), sha256(whole)
    return Packet(head.SerializeToString(), whole)


def given_up(task: updates.Task, client: str, why: str) -> Packet:
    """The reply to a task that was not done."""
    head = updates.Reply(
        schema=task.schema,
        run_id=task.run_id,
        round=task.round,
        base_version=task.base_version,
        kind=task.kind,
        client=client,
        payload_sha256=sha256(b""),
        error=one_line(why, MAX_TEXT),
    )
    return Packet(head.SerializeToString(), b"")


def read_reply(packet: Packet) -> updates.Reply:
    """The header of a reply. Raises WireError."""
    return parse(updates.Reply(), packet.header, MAX_REPLY)


# --- payloads without torch -----------------------------------------------------------------------


def join(buffers: Sequence[bytes]) -> bytes:
    """Payloads (safetensors) of different groups as one. Raises WireError."""
    entries: dict[str, object] = {}
    groups: list[str] = []
    bodies: list[bytes] = []
    at = 0
    for buffer in buffers:
        header, body = _open(buffer)
        facts = header.pop("__metadata__", None)
        try:
            own = json.loads(facts["groups"])  # type: ignore[index]
            groups += [str(group) for group in own]
            for name, entry in header.items():
                start, end = entry["data_offsets"]  # type: ignore[index]
                if name in entries:
                    raise WireError(f"payload has {one_line(name, MAX_TEXT)!r} twice")
                moved = {"data_offsets": [at + int(start), at + int(end)]}
                entries[name] = {**entry, **moved}  # type: ignore[dict-item]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise WireError("payload cannot be read") from error
        bodies.append(body)
        at += len(body)
    text = json.dumps({"__metadata__": {"groups": json.dumps(groups)}, **entries}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + b"".join(bodies)


def _open(buffer: bytes) -> tuple[dict[str, object], bytes]:
    length = int.from_bytes(buffer[:8], "little")
    try:
        header = json.loads(buffer[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise WireError("payload cannot be read") from error
    if not isinstance(header, dict) or len(buffer) < 8 + length:
        raise WireError("payload cannot be read")
    return header, buffer[8 + length :]


def pieces(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of the chunks from `start` on."""
    for offset in range(start, len(data), CHUNK):
        yield offset, data[offset : offset + CHUNK]


def window(low: float, high: float) -> pb.RetryWindow:
    """When to call again."""
    return pb.RetryWindow(min_seconds=low, max_seconds=high)


def wait(window: pb.RetryWindow, draw: float, usual: float = 30.0) -> float:
    """Seconds to wait, `draw` being in [0, 1); at most a day, whatever the other side says."""
    low, high = window.min_seconds, window.max_seconds
    if not 0 <= low <= high <= 86_400:
        low, high = usual / 2, usual
    return low + draw * (high - low)


Capabilities = Mapping[str, object]
"""Fields of the message Capabilities."""
