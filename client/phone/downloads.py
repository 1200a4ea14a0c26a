"""Downloads of a phone from its gateway: blobs, and a base model, chunk by chunk.

A download that is cut goes on where it was, also in another process. Nothing is used before all its
bytes have been checked. Imports neither torch nor grpc.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from corolla.errors import WireError
from corolla.phones import protocol
from corolla.phones.protocol import CHUNK
from corolla.proto import device_pb2 as pb
from corolla.storage.disk import USUAL, DiskLimits, blocks, held

Download = Callable[[pb.DownloadRequest, int], pb.Chunk]
"""The call of that name, and the bytes of its chunk; it tries again until it has an answer."""

_TRIES = 3
"""How often a chunk is asked for that arrives damaged."""


def fetch(blob: pb.Blob, folder: Path, download: Download, most: int) -> bytes:
    """The bytes of a blob, by way of a file in `folder`. Raises WireError when they are others."""
    protocol.check_blob(blob, most)
    if blob.size == len(blob.inline):
        return blob.inline
    part = folder / f"{blob.sha256}.part"
    _fetch_file(blob, part, download)
    data = part.read_bytes()
    part.unlink()
    return data


def fetch_model(
    manifest: pb.Blob, folder: Path, download: Download, limits: DiskLimits = USUAL
) -> Path:
    """A base model's folder in `folder`, fetched unless it is there and whole.

    Others there are deleted, at first where both would take too much of the disk. Raises WireError
    when the gateway offers other bytes than its manifest says, DiskLimitError for too many.
    """
    limits.check_beside("the list of its files", blocks(manifest.size))
    data = fetch(manifest, _made(folder / "manifests"), download, protocol.MAX_MANIFEST)
    files = protocol.read_manifest(data).files
    size = sum(blocks(file.blob.size) for file in files)
    limits.check_beside("it", size)
    found, scratch = folder / manifest.sha256, folder / f"{manifest.sha256}.part"
    if size + held(folder) > limits.beside:
        for other in folder.iterdir():
            if other not in (found, scratch):
                shutil.rmtree(other, ignore_errors=True)
    _made(scratch)
    if not verified(found):
        shutil.rmtree(found, ignore_errors=True)
        _fill(scratch, files, download)
        scratch.rename(found)
    for other in folder.iterdir():
        if other != found:
            shutil.rmtree(other, ignore_errors=True)
    return found


def _fill(scratch: Path, files: Iterable[pb.Manifest.File], download: Download) -> None:
    for file in files:
        path = scratch / file.path
        _made(path.parent)
        chunks = [file.chunks[at : at + 32] for at in range(0, len(file.chunks), 32)]
        _fetch_file(file.blob, path, download, chunks)
    note = {file.path: file.blob.sha256 for file in files}
    (scratch / protocol.NOTE).write_text(json.dumps(note))


def verified(folder: Path) -> bool:
    """Returns whether a model's folder holds what its manifest said, byte for byte."""
    try:
        note = json.loads((folder / protocol.NOTE).read_text())
        return bool(note) and all(_digest(folder / path) == sha for path, sha in note.items())
    except (OSError, ValueError, AttributeError):
        return False


def _fetch_file(
    blob: pb.Blob, path: Path, download: Download, chunks: list[bytes] | None = None
) -> None:
    """Write a blob to a file, beginning after the chunks that are there and right."""
    whole = hashlib.sha256()
    with path.open("a+b") as file:
        file.seek(0)
        while file.tell() < blob.size:
            at = file.tell()
            expected = chunks[at // CHUNK] if chunks else None
            size = min(CHUNK, blob.size - at)
            piece = file.read(size)
            if len(piece) < size or not _is(piece, expected):
                file.truncate(at)
                piece = _chunk(blob, at, expected, download)
                file.seek(at)
                file.write(piece)
                file.flush()
            whole.update(piece)
        file.truncate(blob.size)
        os.fsync(file.fileno())
    if whole.hexdigest() != blob.sha256:
        path.unlink()
        raise WireError(f"the gateway's {path.name} does not match its checksum")


def _chunk(blob: pb.Blob, at: int, expected: bytes | None, download: Download) -> bytes:
    why, size = "a wrong chunk", min(CHUNK, blob.size - at)
    request = pb.DownloadRequest(sha256=blob.sha256, offset=at)
    for _ in range(_TRIES):
        try:
            found = protocol.check_chunk(download(request, size), at, blob.size)
        except WireError as error:
            why = str(error)
            continue
        if len(found) == size and _is(found, expected):
            return found
    raise WireError(f"the gateway sends a wrong chunk at {at} of {blob.sha256[:12]}: {why}")


def _is(piece: bytes, expected: bytes | None) -> bool:
    """Without a checksum of its own a chunk is checked with the whole."""
    return expected is None or hashlib.sha256(piece).digest() == expected


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
