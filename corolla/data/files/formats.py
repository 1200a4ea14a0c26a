"""Rows of one file, one after another: JSON lines, a JSON array, CSV, or parquet.

A file is read in pieces: no more of it is in memory than one row, or one batch of parquet.
"""

import codecs
import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corolla.data.files.streams import HEAD, LONGEST, DamagedError, Opened
from corolla.errors import DataError

_NESTED = frozenset({"messages", "conversations", "choices", "tools", "answers"})
"""Columns that have lists: a cell of CSV holds them as JSON."""

_ABSENT = _NESTED | {"label", "client_id", "user_id", "split", "system", "history"}
"""Columns of which an empty cell of CSV says nothing."""

_BATCH = 256
"""Rows of parquet that are in memory at a time."""

_TABLES = {".csv", ".tsv"}
_JSON = {".json", ".jsonl", ".ndjson"}
_SPACE = b" \t\r\n"
_BLANK = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """A row as it stands in its file."""

    row: Any
    where: str
    """The file and the place in it, for messages."""
    line: int
    """The line of its file, from 1; 0 where there are no lines."""


def records(path: Path, file: Opened, names: frozenset[str]) -> tuple[str, Iterator[Record]]:
    """(the name of the format, the rows). `names` are columns that a header of CSV may have.

    Raises DataError for rows that cannot be read, DamagedError for bytes that cannot.
    """
    if not file.encoding:
        return "parquet", _parquet(path, file)
    head = file.stream.peek(HEAD)[:HEAD]
    first, suffix = head.lstrip(_SPACE)[:1], suffix_of(path)
    if first == b"[" and not (suffix in _TABLES and not _parses(head)):
        return "a JSON array", _array(path, file)
    if suffix in _TABLES and not (first == b"{" and _parses(head)):
        return "CSV", _csv(path, file, head, suffix)
    if first != b"{" and names & {cell.strip().lower() for cell in _cells(head, suffix)}:
        return "CSV", _csv(path, file, head, suffix)
    if first not in (b"{", b"") and suffix not in _JSON:
        raise DataError(
            f"{path}: neither JSON nor CSV with a header of known columns, found "
            f"{head[:30].decode(errors='replace')!r}: give JSON lines, an array, CSV or parquet"
        )
    return "JSON lines", _lines(path, file)


def suffix_of(path: Path) -> str:
    """The end of a file's name that says its format, without that of its packing."""
    name = path.name.lower()
    for packing in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(packing)
    return Path(name).suffix


def _parses(head: bytes) -> bool:
    """Returns whether the first line is JSON."""
    try:
        json.loads(head.lstrip(_SPACE).partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return True


def _numbered(path: Path, file: Opened) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers. Raises DataError for one that is too long."""
    number = 0
    while line := file.stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise DataError(
                f"{path}, line {number}: longer than {LONGEST >> 20} MB: write one row a line"
            )
        yield number, line


def _lines(path: Path, file: Opened) -> Iterator[Record]:
    for number, line in _numbered(path, file):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not JSON: {_no_utf8(error)}") from error
        except (ValueError, RecursionError) as error:
            hint = ""
            if line.strip() in (b"{", b"[") or (number == 1 and b"}" not in line):
                hint = "; write each object on one line, or all into one array"
            raise DataError(f"{where}: not JSON: {error}{hint}") from error
        yield Record(row, where, number)


def _no_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"byte {byte:#04x} is not UTF-8, perhaps the text is in Latin-1 or Windows-1252: save it "
        f"as UTF-8"
    )


def _array(path: Path, file: Opened) -> Iterator[Record]:
    """The elements of an array: what was read is parsed again only when it has doubled."""
    text, place = _Text(path, file), 0
    text.skip("[")
    while (mark := text.next_mark()) != "]":
        if place and mark == ",":
            text.skip(",")
            mark = text.next_mark()
        elif place and mark:
            raise DataError(f"{path}: no comma after row {place} of the JSON array")
        if not mark:
            raise DataError(f"{path}: the JSON array is cut off after {place} rows: copy it again")
        place += 1
        yield Record(text.element(place), f"{path}, row {place}", 0)
    text.skip("]")
    if text.next_mark():
        raise DataError(f"{path}: text after the end of the JSON array: write one array a file")


class _Text:
    """Text of a file, taken from its beginning."""

    def __init__(self, path: Path, file: Opened) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self._text, self._at = "", 0
        self._json = json.JSONDecoder()

    def next_mark(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            if blank := _BLANK.match(self._text, self._at):
                self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1 << 16):
                return ""

    def skip(self, mark: str) -> None:
        """Take a character that is there."""
        self.next_mark()
        self._at += len(mark)

    def element(self, place: int) -> Any:
        """The next value of the array. Raises DataError."""
        self.next_mark()
        wanted = 1 << 16
        while True:
            try:
                value, self._at = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                fault: Exception = error
            else:
                return value
            where = f"{self._path}, row {place}"
            if len(self._text) - self._at > LONGEST:
                raise DataError(
                    f"{where}: not JSON within {LONGEST >> 20} MB, its most: {_plain(fault)}"
                )
            if isinstance(fault, RecursionError) or not self._more(wanted):
                raise DataError(f"{where}: not JSON: {_plain(fault)}")
            wanted = 2 * (len(self._text) - self._at)

    def _more(self, size: int) -> bool:
        piece = self._file.stream.read(size)
        try:
            more = self._decode.decode(piece, not piece)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: {_no_utf8(error)}") from error
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(piece)


def _plain(error: Exception) -> str:
    """A fault of JSON without the place in a piece of the file."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _cells(head: bytes, suffix: str) -> list[str]:
    """The cells of a first line, cut where it has most cells."""
    line = head.decode("utf-8", "replace").partition("\n")[0].rstrip("\r")
    return _cut(line, _delimiter(line, suffix))


def _delimiter(line: str, suffix: str) -> str:
    if suffix == ".tsv":
        return "\t"
    return max(",;\t", key=lambda mark: len(_cut(line, mark)))


def _cut(line: str, mark: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:  # a line end of old kind within
        return []


def _csv(path: Path, file: Opened, head: bytes, suffix: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST)
    line = head.decode("utf-8", "replace").partition("\n")[0]
    rows = csv.reader(_decoded(path, file), delimiter=_delimiter(line, suffix), strict=True)
    header: list[str] = []
    begun = 1
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {begun}: not CSV: {error}: is a quote within a cell not doubled, "
                f"or one not closed?"
            ) from error
        if cells is None:
            return
        if not header and cells:
            header = [cell.strip() for cell in cells]
            twice = sorted({cell for cell in header if cell and header.count(cell) > 1})
            if twice:
                raise DataError(f"{path}: column {twice[0]!r} is there twice: rename one")
        elif cells:
            where = f"{path}, line {begun}"
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells below a header of {len(header)} "
                    f"({', '.join(header)}): is a comma or a line break in a text not quoted?"
                )
            yield Record(dict(zip(header, cells, strict=True)), where, begun)
        begun = rows.line_num + 1


def _decoded(path: Path, file: Opened) -> Iterator[str]:
    for number, line in _numbered(path, file):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: {_no_utf8(error)}") from error


def typed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of CSV with lists where columns have such; an empty cell is absent if it is no text.

    Raises DataError for a list that is not JSON.
    """
    own: dict[str, Any] = {}
    for name, cell in row.items():
        if name in _NESTED and cell:
            try:
                own[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: {name} is not JSON, as lists in a cell of CSV must be"
                ) from error
        elif cell or name not in _ABSENT:
            own[name] = cell
    if "choices" in own and str(own.get("answer", "")).strip().isdecimal():
        own["answer"] = int(own["answer"])
    return own


def _parquet(path: Path, file: Opened) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as scratch:
        source: Any = str(path)
        if file.packed:
            shutil.copyfileobj(file.stream, scratch)
            source = scratch
        number = 0
        try:
            for batch in parquet.ParquetFile(source).iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}", 0)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())[:200]
            raise DamagedError(f"damaged parquet after {number} rows: {why}") from error
