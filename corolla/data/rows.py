"""Rows of text: one example each, from JSON lines or a data set of the hub."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from corolla.embedded.assets import asset
from corolla.errors import DataError

_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_IDS = ("client_id", "user_id")
_SPLITS |= {"eval": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One row. Exactly one of: text; prompt and text (the response); text and label.

    With `choices`, the response is the right one of them.
    """

    text: str
    prompt: str | None = None
    label: str | None = None
    client: str | None = None
    split: str | None = None
    choices: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)
    """The line of its file, from 1; 0: of no file."""
    user: str | None = None
    """The person, or whatever else dp=example protects as a whole; never sent to anybody."""

    def content(self) -> dict[str, Any]:
        """All fields that say what the row is, wherever it stands."""
        left_out = {"line"} if self.user is not None else {"line", "user"}
        return {name: value for name, value in vars(self).items() if name not in left_out}


def read_rows(name: str) -> tuple[list[Example], str]:
    """The rows of a data set and the sha256 of its content: 'embedded', .jsonl file or hub name.

    Raises DataError naming the line that cannot be used.
    """
    path = asset("data.jsonl") if name == "embedded" else Path(name)
    if name == "embedded" or path.suffix in {".jsonl", ".json"} or path.exists():
        return _read_lines(path)
    rows = _read_hub(name)
    digest = hashlib.sha256(json.dumps([r.content() for r in rows], sort_keys=True).encode())
    return rows, digest.hexdigest()


def _read_lines(path: Path) -> tuple[list[Example], str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        rows.append(_example(row, f"{path}, line {number}", number))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows, hashlib.sha256(content).hexdigest()


def _read_hub(name: str) -> list[Example]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen unrelated types for a missing name
        raise DataError(
            f"data set {name!r} is neither a file here nor on the hub: {str(error).splitlines()[0]}"
        ) from error
    rows = []
    for split, table in splits.items():
        for number, row in enumerate(table):
            rows.append(_example({"split": str(split), **row}, f"{name}, {split} row {number}"))
    return rows


def _example(row: Any, where: str, line: int = 0) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    row, choices = _answered(row, where)
    if ("response" in row) != ("prompt" in row) or ("prompt" in row and "text" in row):
        raise DataError(f"{where}: needs both prompt and response, or text alone")
    text, prompt = row.get("text", row.get("response")), row.get("prompt")
    if not isinstance(text, str) or ("prompt" in row and not isinstance(prompt, str)):
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise DataError(f"{where}: needs text, or prompt and response, as strings; found {found}")
    split = row.get("split") or ""
    if split and str(split) not in _SPLITS:
        raise DataError(f"{where}: unknown split {split!r}: use train, validation or test")
    label, client, user = (row.get("label"), *(_identity(row.get(key)) for key in _IDS))
    ids = (("client_id", client), ("user_id", user))
    for key, value in (("text", text), ("prompt", prompt), ("label", label), *ids):
        if not _encodable(str(value)):
            raise DataError(f"{where}: {key} has half of a surrogate pair, which is no text")
    return Example(
        text,
        prompt,
        None if label is None else str(label),
        client,
        _SPLITS.get(split),
        choices,
        line,
        user,
    )


def _identity(value: Any) -> str | None:
    """An id as text; None for what names nobody: null, NaN (a gap in a table), blank text."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN
        return None
    return str(value)


def _answered(row: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(a row with prompt and response where it has a question and an answer, its choices)."""
    if "text" in row or "response" in row or "answer" not in row:
        return row, ()
    if "prompt" not in row and "question" in row:
        row = {**row, "prompt": row["question"]}
    if "prompt" not in row:
        return row, ()
    answer, choices = row["answer"], row.get("choices")
    if choices is None:
        return {**row, "response": answer}, ()
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: choices must be a list of at least two strings")
    for choice in choices:
        if not isinstance(choice, str) or not choice or not _encodable(choice):
            raise DataError(f"{where}: choices must be strings that are not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be the index of a choice, 0 to {len(choices) - 1}, "
            f"found {answer!r}"
        )
    return {**row, "response": choices[answer]}, tuple(choices)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_one_kind(rows: Sequence[Example], name: str) -> None:
    """Raises DataError where rows of different kinds are mixed: `name` is that of their file."""
    labelled = sum(row.label is not None for row in rows)
    if labelled not in (0, len(rows)):
        raise DataError(f"{name}: {labelled} of {len(rows)} rows have a label; all or none must")
    if labelled and any(row.prompt is not None for row in rows):
        raise DataError(f"{name}: rows have prompt, response and label; use text and label")
    chosen = sum(bool(row.choices) for row in rows)
    if chosen not in (0, len(rows)):
        raise DataError(f"{name}: {chosen} of {len(rows)} rows have choices; all or none must")


def check_clients(rows: Sequence[Example], name: str, remedy: str = "") -> None:
    """Raises DataError where some rows have client_id and others do not, with the first that lacks.

    One row alone would decide what a client is, and what dp=client protects. `name` is that of the
    file, `remedy` what else can be done.
    """
    _all_or_none(rows, [row.client is None for row in rows], name, "client_id", remedy)


def check_users(rows: Sequence[Example], name: str) -> None:
    """Raises DataError where some rows have user_id and others do not, as `check_clients` does.

    One row alone would decide what dp=example protects.
    """
    _all_or_none(rows, [row.user is None for row in rows], name, "user_id", "")


def _all_or_none(
    rows: Sequence[Example], lacks: Sequence[bool], name: str, key: str, remedy: str
) -> None:
    if 0 < sum(lacks) < len(rows):
        first = lacks.index(True)
        line = rows[first].line
        where = f"line {line}" if line else f"row {first + 1}"
        raise DataError(
            f"{name}: {sum(lacks)} of {len(rows)} rows have no {key}, the first is {where}; "
            f"all or none must{remedy}"
        )


def unit_of(rows: Sequence[Example]) -> Literal["example", "user"]:
    """Returns the unit that dp=example protects as a whole: "user" where rows name users."""
    return "user" if any(row.user is not None for row in rows) else "example"


def counted(dp: str, rows: Sequence[Example]) -> int:
    """Counts the users of these rows with dp=example, where rows name them; else the rows."""
    users = dp == "example" and unit_of(rows) == "user"
    return len({row.user for row in rows}) if users else len(rows)


def units(rows: Sequence[Example]) -> list[int | None]:
    """The number of each row's user, from 0 in the order in which they come; None without."""
    numbers: dict[str, int] = {}
    return [
        None if row.user is None else numbers.setdefault(row.user, len(numbers)) for row in rows
    ]
