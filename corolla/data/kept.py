"""Rows that are too much for memory: on disk, read from there one by one, and found again there.

What was read of files stands in a folder of the cache, which its owner alone can read, for as long
as the files, the names of columns and splits, and the code that reads them are the same. Of a set
of the hub nothing stays.
"""

import gc
import hashlib
import itertools
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from corolla.data.files import sources
from corolla.data.files.sources import Reading, Source
from corolla.data.forms import Turn
from corolla.data.rows import Example, Rows, examples, rows_of
from corolla.errors import DataError
from corolla.host import files
from corolla.storage.shelf import Shelf, Shelving

HELD = 64 * 2**20
"""Characters of rows that are held in memory; of a source with more all rows are on disk."""

_STALE = 86400.0
"""Seconds after which a folder that nobody has finished is deleted."""

_FACTS = "facts.json"
_COUNTS = ("containers", "columns", "unread")
_NAMED = ("client", "label", "user", "split")
"""Fields of an example that are in memory, as numbers of names; so is its line."""

_EMPTY: Mapping[str, Any] = {
    "prompt": None,
    "choices": (),
    "turns": (),
    "tools": "",
    "unused": frozenset(),
}
"""Fields of an example that are on disk where they are not as here; text always is."""


class Shelved(Example):
    """An example of which the content is on disk, and read when it is asked for."""

    __slots__ = ("_at", "_contents")
    _at: int
    _contents: "_Contents"

    def __getattr__(self, name: str) -> Any:
        if name != "text" and name not in _EMPTY:
            raise AttributeError(name)
        return self._contents.of(self._at)[name]


class _Contents:
    """The contents of a shelf's rows; the one that was read last stays in memory."""

    def __init__(self, shelf: Shelf, folder: Path) -> None:
        self._shelf, self._folder = shelf, folder
        self._last: tuple[int, dict[str, Any]] | None = None

    def of(self, at: int) -> dict[str, Any]:
        """The fields of a row that are on disk. Raises DataError where they are damaged."""
        last, flags = self._last, int(self._shelf.columns["has"][at])
        if last is None or last[0] != at:
            try:
                names = [own for i, own in enumerate(_EMPTY) if flags >> i & 1]
                last = at, _unpacked(self._shelf[at], names)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise DataError(f"rows kept in {self._folder} are damaged: delete it") from error
            self._last = last
        return last[1]


def read(source: Source) -> Rows:
    """The rows of a source, on disk where they are many. Raises DataError as `rows.read` does."""
    folder = _folder(source)
    if (folder / _FACTS).is_file() and (kept := _found(folder, sources.fingerprint(source))):
        return kept
    reading, unused = Reading(), Counter[str]()
    held, size = list[Example](), 0
    rest = examples(source, reading, unused)
    for row in rest:
        held.append(row)
        size += row.size + len(row.prompt or "") + len(row.tools) + sum(map(len, row.choices))
        if size > HELD:
            break
    else:
        return rows_of(source, held, reading, unused)
    with _making(folder) as scratch:
        names = _shelve(scratch, held, rest)
        place, facts = scratch, {"code": _code(), "names": names, "unused": unused}
        told = json.dumps({**facts, "reading": vars(reading)})
        (scratch / _FACTS).write_text(told, encoding="utf-8")
        if reading.fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process has just put the same there
                place = scratch.replace(folder)
        kept = _found(place, reading.fingerprint)
    if kept is None:
        raise DataError(f"rows kept in {folder} are damaged: delete it")
    return kept if kept.fingerprint else rows_of(source, kept.examples, reading, unused)


@cache
def _code() -> str:
    """The sha256 of the code that reads rows: what other code has read is read anew."""
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()


def _folder(source: Source) -> Path:
    """The place of what is kept of a source."""
    path = Path(source.name)
    told = {**asdict(source), "name": str(path.absolute()) if path.exists() else source.name}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return files.cache_dir() / f"rows-{key[:32]}"


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write rows to. Raises DataError where there is no room for them.

    It is deleted at the end if it has not become `folder`; on POSIX a file that is open stays.
    """
    try:
        with files.private():
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob("rows-*.part-*"):
                if left.stat().st_mtime < time.time() - _STALE:
                    shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot keep rows in {folder.parent}: {error.strerror or error}; name a folder with "
            f"room for as much again as the data in COROLLA_CACHE"
        ) from error


def _shelve(
    folder: Path, held: list[Example], rest: Iterator[Example]
) -> dict[str, list[str | None]]:
    """Writes rows to a shelf, of those in memory as well; the names of its numbers, by field."""
    numbers: dict[str, dict[str | None, int]] = {name: {None: 0} for name in _NAMED}
    shelving, line = Shelving(folder, (*_NAMED, "line", "has")), 0
    try:
        for row in itertools.chain(held, rest):
            known = [of.setdefault(getattr(row, name), len(of)) for name, of in numbers.items()]
            has = [getattr(row, name) != empty for name, empty in _EMPTY.items()]
            flags = sum(1 << i for i, there in enumerate(has) if there)
            shelving.add(_packed(row, has), (*known, row.line - line, flags))
            line = row.line
    finally:
        shelving.close()
    return {name: list(of) for name, of in numbers.items()}


def _found(folder: Path, fingerprint: str) -> Rows | None:
    """The rows kept in a folder; None where they are of other content, or damaged."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if facts["code"] != _code() or facts["reading"]["fingerprint"] != fingerprint:
            return None
        counts = {name: Counter(facts["reading"][name]) for name in _COUNTS}
        reading, unused = Reading(**{**facts["reading"], **counts}), Counter(facts["unused"])
        shelf = Shelf(folder)
        with _uncollected():
            found = list(_examples(shelf, facts["names"], _Contents(shelf, folder)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DataError):
        return None
    return Rows(found, fingerprint, reading, unused)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps what is made away from the collector of circles, which is in none.

    It would look at each of a million rows again and again, for as long as the process lives.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def _examples(
    shelf: Shelf, names: Mapping[str, list[str | None]], contents: _Contents
) -> Iterator[Example]:
    """The rows of a shelf, in their order."""
    empty = [
        [own for i, own in enumerate(_EMPTY.items()) if not flags >> i & 1]
        for flags in range(1 << len(_EMPTY))
    ]
    numbers = [shelf.columns[name].tolist() for name in (*_NAMED, "has")]
    lines = np.cumsum(shelf.columns["line"], dtype=np.int64).tolist()
    put = object.__setattr__  # examples are frozen
    for at, (line, *known, flags) in enumerate(zip(lines, *numbers, strict=True)):
        row = Shelved.__new__(Shelved)
        put(row, "_at", at)
        put(row, "_contents", contents)
        put(row, "line", line)
        for name, number in zip(_NAMED, known, strict=True):
            put(row, name, names[name][number])
        for name, nothing in empty[flags]:
            put(row, name, nothing)
        yield row


def _packed(row: Example, has: Sequence[bool]) -> bytes:
    """The content of a row as the JSON text of a list: its text, and the fields that it has."""
    parts: list[Any] = [row.text]
    parts += [_plain(getattr(row, name)) for name, there in zip(_EMPTY, has, strict=True) if there]
    return _JSON.encode(parts).encode()


def _plain(value: Any) -> Any:
    """A field as JSON can hold it."""
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [list(vars(own).values()) if isinstance(own, Turn) else own for own in value]
    return value


def _unpacked(packed: bytes, names: Sequence[str]) -> dict[str, Any]:
    """The fields of a row with these names, from what `_packed` made of it."""
    found = dict(zip(("text", *names), json.loads(packed.decode()), strict=True))
    for name in found.keys() & {"choices", "turns", "unused"}:
        made = (Turn(*own) if name == "turns" else own for own in found[name])
        found[name] = type(_EMPTY[name])(made)
    return found


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
