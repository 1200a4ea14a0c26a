"""Bytes of a data file as text in UTF-8: unpacked within bounds and decoded, or named.

What a file is follows from its content, not from its name: gzip is gzip whatever it is called.
"""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import zstandard

from corolla.errors import DataError

LONGEST = 64 * 2**20
"""Bytes of a line or of an element of an array, at most."""

RATIO = 200
"""Bytes that a packed byte may become, at most, beyond the first LONGEST bytes."""

HEAD = 1 << 14
"""Bytes from which a file is recognised."""

_STEP = 1 << 8
"""Packed bytes that are unpacked at a time by zstd: each may become many thousands."""

_WINDOW = 1 << 27
"""Bytes of memory that a zstd file may ask for."""

_LAYERS = 3
"""How often a file may be packed."""

_BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""Marks with which text begins, the longer ones first → its encoding."""

_FOREIGN = {
    b"PK\x03\x04": ("a zip file (a workbook of Excel is one too)", "unpack it, or save it as CSV"),
    b"PK\x05\x06": ("an empty zip file", "give the data itself"),
    b"%PDF": ("a PDF document", "give its text as JSON lines"),
    b"\xd0\xcf\x11\xe0": ("a workbook or document of old Office", "save it as CSV in UTF-8"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"BZh": ("a bzip2 file", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("an xz file", "unpack it with unxz"),
    b"ARROW1": ("an Arrow file", "save it as parquet"),
    b"SQLite format 3": ("an SQLite database", "export its table as CSV"),
    b"\x89HDF": ("an HDF5 file", "save it as parquet"),
    b"\x93NUMPY": ("a NumPy array", "give text as JSON lines"),
    b"Obj\x01": ("an Avro file", "save it as parquet"),
    b"ORC": ("an ORC file", "save it as parquet"),
    b"\x80\x04\x95": ("a pickle, which is never loaded", "save it as parquet or JSON lines"),
    b"\x80\x02": ("a pickle, which is never loaded", "save it as parquet or JSON lines"),
    b"GGUF": ("a GGUF model", "give it as --model"),
    b"\x89PNG": ("a picture", "give text as JSON lines"),
    b"\xff\xd8\xff": ("a picture", "give text as JSON lines"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself: git lfs pull"),
}
"""First bytes of files that are no rows → what they are, and what to do."""

_PAGES = (b"<!doctype", b"<html", b"<?xml")


class DamagedError(Exception):
    """Bytes that cannot be unpacked or decoded; the text says why. Never leaves corolla.data."""


@dataclass
class Opened:
    """A file as bytes of UTF-8, and how they were had."""

    stream: io.BufferedReader
    packed: list[str]
    """Names of what was unpacked, the outermost first."""
    encoding: str
    """The name of the encoding of a text; "" where the content is no text."""
    digest: Any
    """The hash of the file's own bytes, complete when `sha256` has been called."""
    _raw: io.BufferedReader

    def sha256(self) -> str:
        """The sha256 of the file's own bytes: what was not read yet is read."""
        while self._raw.read(1 << 20):
            pass
        return str(self.digest.hexdigest())


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """A data file, unpacked and decoded. Raises DataError for one that is something else."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            raw = cast(io.BufferedReader, io.BufferedReader(_Hashed(file, digest), 1 << 16))
            yield _opened(raw, digest, path)
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}") from error
    except DamagedError as error:
        raise DataError(f"{path}: {error}") from error


def sha256(path: Path) -> str:
    """The sha256 of a file's own bytes. Raises DataError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}") from error


def _opened(raw: io.BufferedReader, digest: Any, path: Path) -> Opened:
    stream, packed = raw, list[str]()
    while kind := _packing(stream.peek(4)):
        if len(packed) == _LAYERS:
            raise DamagedError(f"packed more than {_LAYERS} times: unpack it yourself")
        packed.append(kind)
        unpack = _gunzipped if kind == "gzip" else _unzstd
        stream = io.BufferedReader(_Pieces(_bounded(unpack(stream), raw)), 1 << 16)
    head = stream.peek(HEAD)[:HEAD]
    if head.startswith(b"PAR1"):
        return Opened(stream, packed, "", digest, raw)
    if found := _foreign(head):
        what, remedy = found
        raise DataError(f"{path} is {what}, found by its first bytes: {remedy}")
    encoding = _encoding(head)
    if encoding == "utf-8-sig":
        stream.read(3)
    elif encoding != "utf-8":
        stream = io.BufferedReader(_Pieces(_transcoded(stream, encoding)), 1 << 16)
    names = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8 with a mark"}
    name = names.get(encoding, encoding.upper())
    return Opened(stream, packed, name, digest, raw)


def _packing(head: bytes) -> str:
    """The name of the packing that begins so; "" for none."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else ""


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Returns the kind of a file that is no rows, and what to do; None where it may be rows."""
    for magic, found in _FOREIGN.items():
        if head.startswith(magic):
            return found
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    if head.lstrip().lower().startswith(_PAGES):
        return "an HTML or XML page, perhaps the error page of a download", "download it again"
    if head and not head.strip(b"\x00"):
        return "nothing but NUL bytes, as far as looked at", "the copy was cut off: copy it again"
    return None


def _encoding(head: bytes) -> str:
    """The encoding of text by its mark, or by where its first characters have NUL bytes."""
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    if b"\x00" not in head[:4]:
        return "utf-8"
    found = json.detect_encoding(head[:4])
    if not head[:4].decode(found, "replace").isascii():
        raise DamagedError("it is no text: its first bytes are of no encoding of one")
    return found


def _gunzipped(stream: io.BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as file:
        try:
            while piece := file.read(1 << 16):
                yield piece
        except EOFError:
            raise DamagedError("the gzip file is cut off: copy or download it again") from None
        except (OSError, zlib.error) as error:
            raise DamagedError(f"the gzip file is damaged: {error}") from None


def _unzstd(stream: io.BufferedReader) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    frame, begun = unpacker.decompressobj(), False
    try:
        while rest := stream.read(_STEP):
            while rest:
                begun = True
                yield frame.decompress(rest)
                rest = b""
                if frame.eof:
                    rest, begun = frame.unused_data, False
                    frame = unpacker.decompressobj()
    except zstandard.ZstdError as error:
        raise DamagedError(f"the zstd file is damaged: {error}") from None
    if begun:
        raise DamagedError("the zstd file is cut off: copy or download it again")


def _bounded(pieces: Iterator[bytes], packed: io.BufferedReader) -> Iterator[bytes]:
    """Unpacked bytes, for as long as they are not too many for what they were unpacked from."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > LONGEST + RATIO * packed.tell():
            raise DamagedError(
                f"unpacks to more than {RATIO} times its size, as bombs do: unpack it yourself if "
                f"it is none"
            )
        yield piece


def _transcoded(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while piece := stream.read(1 << 16):
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise DamagedError(f"begins as {encoding.upper()}, but is not: {error}") from None


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer):  # a head must not end with the first small piece
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
            size = min(len(buffer) - filled, len(self._rest))
            buffer[filled : filled + size] = self._rest[:size]
            self._rest, filled = self._rest[size:], filled + size
        return filled


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: io.BufferedReader, digest: Any) -> None:
        self._file, self._digest, self._at = file, digest, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:size])
        self._at += size
        return size

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at
