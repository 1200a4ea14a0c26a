"""Blobs that a gateway offers for download: bytes by their sha256, in chunks; also a base model."""

import hashlib
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from corolla.errors import ConfigError
from corolla.host.files import write_atomic
from corolla.phones import protocol
from corolla.phones.protocol import CHUNK, INLINE
from corolla.proto import device_pb2 as pb

LENT = 1 << 28
"""Bytes of blobs that few phones have a use for: the oldest are not offered any more."""
_RESIDENT = 1 << 18
"""Bytes of a blob that stay in memory; larger ones lie on disk."""


class Blobs:
    """A store of blobs: those of a task until the next one, files of a base model for good."""

    def __init__(self, folder: Path) -> None:
        """Deletes the files that an earlier process left in `folder`."""
        self._folder = folder
        self._lock = threading.Lock()
        self._small: dict[str, bytes] = {}
        self._files: dict[str, tuple[Path, int]] = {}
        self._shared: dict[str, tuple[Path, int]] = {}
        self._lent: dict[str, int] = {}  # name → bytes, oldest first
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()

    def put(self, data: bytes, group: str = "", content: str = "") -> pb.Blob:
        """Offer bytes; how they are announced. Few bytes travel with the announcement."""
        if not data:
            return pb.Blob(group=group, content=content)
        name = protocol.sha256(data)
        with self._lock:
            if len(data) <= _RESIDENT:
                self._small[name] = data
            elif name not in self._files:
                write_atomic(self._folder / name, data)
                self._files[name] = (self._folder / name, len(data))
        inline = data if len(data) <= INLINE else b""
        return pb.Blob(sha256=name, size=len(data), group=group, content=content, inline=inline)

    def lend(self, data: bytes) -> pb.Blob:
        """Offer bytes until there are LENT of such that are younger; how they are announced."""
        blob = self.put(data)
        with self._lock:
            self._lent.pop(blob.sha256, None)
            self._lent[blob.sha256] = blob.size
            while len(self._lent) > 1 and sum(self._lent.values()) > LENT:
                self._drop(next(iter(self._lent)))
        return blob

    def share(self, name: str, path: Path, size: int) -> None:
        """Offer a file that stays where it is."""
        with self._lock:
            self._shared[name] = (path, size)

    def share_all(self, data: bytes, files: Mapping[str, Path], path: Path) -> pb.Blob:
        """Offer files (sha256 → file) and the Manifest of them, which is kept at `path`."""
        for name, file in files.items():
            self.share(name, file, file.stat().st_size)
        blob = pb.Blob(sha256=protocol.sha256(data), size=len(data))
        write_atomic(path, data)
        self.share(blob.sha256, path, len(data))
        return blob

    def keep(self, names: Collection[str]) -> None:
        """Offer no other blobs that were put; shared files stay."""
        with self._lock:
            for name in (self._small.keys() | self._files.keys()) - set(names):
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._lent.pop(name, None)
        self._small.pop(name, None)
        if own := self._files.pop(name, None):
            own[0].unlink(missing_ok=True)

    def chunk(self, name: str, offset: int) -> pb.Chunk:
        """The piece of a blob that begins at `offset`. Raises KeyError where there is none."""
        with self._lock:
            data = self._small.get(name)
            path, size = (
                (Path(), len(data))
                if data is not None
                else self._files.get(name) or self._shared[name]
            )
        if not 0 <= offset < size:
            raise KeyError(name)
        if data is not None:
            return protocol.chunk(data[offset : offset + CHUNK], offset, size)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return protocol.chunk(file.read(CHUNK), offset, size)
        except OSError as error:  # the next task has taken its place
            raise KeyError(name) from error


def manifest(folder: Path) -> tuple[bytes, Mapping[str, Path]]:
    """(the serialized Manifest of a model's folder, sha256 → file).

    Files that can run code when they are loaded are left out. Raises ConfigError for a folder that
    is no model.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--share-model {folder} is no model: it has no config.json")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return manifest_of(
        folder,
        # A note: this model was fetched from another gateway.
        [n for n in sorted(names, key=Path) if not n.startswith(".") and n != protocol.NOTE],
        protocol.MODEL_FILES,
    )


def manifest_of(
    folder: Path, names: Iterable[str], suffixes: Collection[str]
) -> tuple[bytes, Mapping[str, Path]]:
    """(the serialized Manifest of files in a folder, sha256 → file); of `suffixes`, no others.

    Raises WireError for what cannot be told to a phone, OSError.
    """
    made = pb.Manifest()
    files: dict[str, Path] = {}
    for name in names:
        path = folder / name
        if path.suffix not in suffixes:
            continue
        sha256, size, chunks = _digests(path)
        blob = pb.Blob(sha256=sha256, size=size)
        made.files.append(pb.Manifest.File(path=name, blob=blob, chunks=b"".join(chunks)))
        files[sha256] = path
    data = made.SerializeToString(deterministic=True)
    protocol.read_manifest(data, suffixes)  # WireError here, not on every phone
    return data, files


def _digests(path: Path) -> tuple[str, int, list[bytes]]:
    """(sha256, bytes, sha256 of each chunk) of a file, read once."""
    whole, size, chunks = hashlib.sha256(), 0, list[bytes]()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            whole.update(piece)
            size += len(piece)
            chunks.append(hashlib.sha256(piece).digest())
    return whole.hexdigest(), size, chunks
