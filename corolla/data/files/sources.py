"""Where rows come from: one file, a folder of files, or a data set of the hub.

What a folder is follows from its files. They are parts of one data set where they are called as
splits or shards are (train.csv, test-00000-of-00012.parquet) or where their rows name clients;
else each file is a client, and its name without endings is the client's id.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.data.files import formats, streams
from corolla.data.files.columns import COLUMNS
from corolla.data.files.formats import Record
from corolla.embedded.assets import asset
from corolla.errors import ConfigError, DataError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "eval", "dev"), "validation"),
    "test": "test",
}
"""The name of a split in data → its name here."""

SUFFIXES = frozenset({".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"})
"""Ends of the names of data files; each may be packed, as .gz or .zst."""

_NO_TEXT = frozenset({"split", "client_id", "user_id", "label"})
_PACKED = {".gz", ".gzip", ".zst", ".zstd"}
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Source:
    """A source of rows. `columns` and `splits` are names here → names in the data.

    With `splits` rows of no other split are read. `subset` is the configuration of a hub set.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None


@dataclass
class Reading:
    """How a source was read; complete when its last row has been taken."""

    containers: Counter[str] = field(default_factory=Counter)
    """In words what files are → how many of them."""
    fingerprint: str = ""
    """The sha256 of the content; "" for a set of the hub, which has no bytes of its own."""
    columns: Counter[str] = field(default_factory=Counter)
    """Columns, with our names → the rows that have them."""
    unread: Counter[str] = field(default_factory=Counter)
    """Split → the number of its rows that were not asked for."""
    ignored: int = 0
    """Files of a folder that are no data."""
    client_files: bool = False
    """True where each file of a folder is a client."""

    def told(self) -> str:
        """The containers in words."""
        known = [f"{n} files, {what}" if n > 1 else what for what, n in self.containers.items()]
        each = ", one a client" if self.client_files else ""
        return "; ".join(known) + each


def rows(source: Source, reading: Reading) -> Iterator[Record]:
    """The rows of a source with our names for columns and splits; `reading` is filled meanwhile.

    Raises DataError for what is missing, damaged, or no data, ConfigError for names of columns and
    splits that nothing here has.
    """
    _check(source)
    path = asset("data.jsonl") if source.name == "embedded" else Path(source.name)
    if source.name != "embedded" and path.is_dir():
        found = _folder(path, source, reading)
    elif source.name == "embedded" or path.exists() or _ends(path) & SUFFIXES:
        found = _file(path, source, reading)
    else:
        found = _hub(source, reading)
    theirs = {name: own for own, name in source.splits.items()}
    for record in found:
        if theirs and isinstance(record.row, dict) and not _chosen(record.row, theirs, reading):
            continue
        if isinstance(record.row, dict):
            reading.columns.update(map(str, record.row))
        yield record


def fingerprint(source: Source) -> str:
    """The fingerprint that reading a file or a folder gives it; "" for a set of the hub.

    Raises DataError for files that cannot be read.
    """
    path = Path(source.name)
    if not path.exists() or source.name == "embedded":
        return ""
    if path.is_dir():
        names = _names(path, Reading())
        return _together((name, streams.sha256(own)) for own, name in names.items())
    return streams.sha256(path)


def _check(source: Source) -> None:
    splits = sorted(set(SPLITS.values()))
    others = [f"columns.{name}" for name in source.columns if name not in COLUMNS]
    others += [f"splits.{name}" for name in source.splits if name not in splits]
    if others:
        raise ConfigError(
            f"{others[0]} names nothing that is read: columns are {', '.join(sorted(COLUMNS))}, "
            f"and splits {', '.join(splits)}"
        )
    if source.name == "embedded" and (source.columns or source.splits or source.subset):
        raise ConfigError("columns, splits and subset are of other data: leave them out, or --data")


def _ends(path: Path) -> set[str]:
    return {end.lower() for end in path.suffixes[-2:]}


def _file(path: Path, source: Source, reading: Reading) -> Iterator[Record]:
    with streams.opened(path) as file:
        names = COLUMNS | {name.lower() for name in source.columns.values()}
        kind, found = formats.records(path, file, names)
        words = [kind, *file.packed, *([file.encoding] if file.encoding else [])]
        reading.containers[", ".join(words)] += 1
        for row, where, line in found:
            own = _renamed(row, source, where)
            yield Record(formats.typed(own, where) if kind == "CSV" else own, where, line)
        reading.fingerprint = file.sha256()


def _renamed(row: Any, source: Source, where: str) -> Any:
    """A row with our names for columns; what is no row stays as it is. Raises DataError.

    A column that is named otherwise has lost its old name, so that it is not taken for another.
    """
    if not source.columns or not isinstance(row, dict):
        return row
    lacking = [name for name in source.columns.values() if name not in row]
    if lacking:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{where}: no column {lacking[0]!r}, which the key columns asks for; found {found}"
        )
    taken = set(source.columns.values()) | set(source.columns)
    rest = {name: value for name, value in row.items() if name not in taken}
    return {**rest, **{own: row[name] for own, name in source.columns.items()}}


def _chosen(row: dict[str, Any], theirs: Mapping[str, str], reading: Reading) -> bool:
    """Returns whether the row's split is asked for; it then gets its name here."""
    split = str(row.get("split") or "train")
    if split not in theirs:
        reading.unread[split] += 1
        return False
    row["split"] = theirs[split]
    return True


def _folder(folder: Path, source: Source, reading: Reading) -> Iterator[Record]:
    """The rows of all data files below a folder, in the order of their names."""
    names = _names(folder, reading)
    known = SPLITS.keys() | set(source.splits.values())
    parts = len(names) == 1 or all(_is_part(name, known) for name in names.values())
    prints = list[tuple[str, str]]()
    told = dict[bool, Path]()
    """True for rows that name clients, False for rows without → the first file of such rows."""
    for path, name in names.items():
        one = Reading(reading.containers)
        found = _file(path, source, one)
        first = next(found, None)
        own = first is not None and isinstance(first.row, dict) and "client_id" in first.row
        if first is not None:
            told.setdefault(own, path)
        if len(told) > 1:
            raise DataError(
                f"rows of {told[True]} have client_id, those of {told[False]} have none: in all "
                f"files of a folder, or in none"
            )
        outer = name.partition("/")[0] if "/" in name else ""
        said = {"split": split} if (split := _split_of(name, known)) else {}
        if not own and not parts:
            reading.client_files = True
            said["client_id"] = name.removeprefix(f"{outer}/") if outer in known else name
        for row, where, _ in itertools.chain([first] if first else [], found):
            yield Record(_placed(row, said, where), where, 0)
        prints.append((name, one.fingerprint))
    reading.fingerprint = _together(prints)


def _names(folder: Path, reading: Reading) -> dict[Path, str]:
    """The data files below a folder, sorted → their names without endings. Raises DataError."""
    every = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)]
    files = sorted(path for path in every if _ends(path) & SUFFIXES)
    reading.ignored = len(every) - len(files)
    if not files:
        raise DataError(
            f"folder {folder} has no data: no file in it ends in {', '.join(sorted(SUFFIXES))}, "
            f"which .gz or .zst may follow"
        )
    return {path: _name(path, folder) for path in files}


def _together(prints: Iterable[tuple[str, str]]) -> str:
    """The fingerprint of a folder, from (name, sha256) of its files in their order."""
    return hashlib.sha256("".join(f"{name} {own}\n" for name, own in prints).encode()).hexdigest()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _name(path: Path, folder: Path) -> str:
    """A file's path in its folder, without the endings of its name."""
    name = path.relative_to(folder).as_posix()
    while (end := Path(name).suffix.lower()) in SUFFIXES | _PACKED:
        name = name[: -len(end)]
    return name


def _stem(name: str) -> str:
    """The last part of a file's name, without the number of a shard: train-00000-of-00002."""
    last = name.rpartition("/")[2]
    return _SHARD.sub("", last)


def _is_part(name: str, known: Set[str]) -> bool:
    last = name.rpartition("/")[2]
    return _stem(name) in known or _SHARD.search(last) is not None


def _split_of(name: str, known: Set[str]) -> str:
    """The split that a file's name or its outer folder says, as the data call it; "" for none."""
    outer = name.partition("/")[0] if "/" in name else ""
    return next((part for part in (_stem(name), outer) if part in known), "")


def _placed(row: Any, said: Mapping[str, str], where: str) -> Any:
    """A row with what its file says of it. Raises DataError where the row names a client too."""
    if not isinstance(row, dict):
        return row
    if "client_id" in said and "client_id" in row:
        raise DataError(f"{where}: has client_id, and the first row of its file has none")
    return {**row, **said} if row.get("split") in (None, "") else {**said, **row}


def _hub(source: Source, reading: Reading) -> Iterator[Record]:
    import datasets

    asked = (source.name, source.subset) if source.subset else (source.name,)
    try:
        splits = datasets.load_dataset(*asked)
    except Exception as error:  # the library raises a dozen unrelated types for a missing name
        why = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "; choose one with --set subset=NAME" if "onfig name is missing" in why else ""
        raise DataError(
            f"data set {source.name!r} is neither a file here nor on the hub: {why}{hint}"
        ) from error
    lacking = [name for name in source.splits.values() if name not in splits]
    if lacking:
        raise DataError(f"{source.name} has no split {lacking[0]!r}: it has {', '.join(splits)}")
    reading.containers["a data set of the hub"] += 1
    for split, table in splits.items():
        if source.splits and str(split) not in source.splits.values():
            reading.unread[str(split)] += len(table)
            continue
        for number, row in enumerate(table):
            where = f"{source.name}, {split} row {number}"
            yield Record(_renamed({"split": str(split), **row}, source, where), where, 0)


def hint(row: Any) -> str:
    """Returns the advice on a row that is of no form: "" where it has columns of known names."""
    if not isinstance(row, dict) or not row or row.keys() & COLUMNS - _NO_TEXT:
        return ""
    first = next((str(name) for name in row if name not in _NO_TEXT), "NAME")
    named = f"text={first}" if len(row.keys() - _NO_TEXT) == 1 else "prompt=NAME"
    return (
        f"; what is called otherwise is named, as with --set columns.{named}, by a device with "
        f"--columns {named}"
    )
