"""Rows of text: one example each, from wherever they come."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from corolla.data import columns, sources
from corolla.data.sources import SPLITS, Reading, Source
from corolla.errors import DataError

_IDS = ("client_id", "user_id")


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


@dataclass(frozen=True)
class Rows:
    """All examples of a source, and how they were read."""

    examples: list[Example]
    fingerprint: str
    """The sha256 of the content."""
    reading: Reading
    unused: Counter[str]
    """Columns that change what a row means and are not used → the rows that have them."""


def read(source: Source) -> Rows:
    """The rows of a source. Raises DataError naming the row that cannot be used."""
    reading, unused = Reading(), Counter[str]()
    examples = []
    for row, where, line in sources.rows(source, reading):
        try:
            example = _example(row, where, line)
        except DataError as error:
            raise DataError(f"{error}{sources.hint(row)}") from None
        unused.update(columns.unused(row, vars(example)))
        examples.append(example)
    if not examples:
        left = ", ".join(f"{split} ({n})" for split, n in reading.unread.items())
        rest = f" of the splits that are asked for: it has {left}" if left else ""
        raise DataError(f"{source.name} has no rows{rest}")
    content = json.dumps([row.content() for row in examples], sort_keys=True).encode
    fingerprint = reading.fingerprint or hashlib.sha256(content()).hexdigest()
    return Rows(examples, fingerprint, reading, unused)


def read_rows(name: str) -> tuple[list[Example], str]:
    """The rows of a source with its own names, and the sha256 of its content, as `read` has them.

    Raises DataError naming the row that cannot be used.
    """
    found = read(Source(name))
    return found.examples, found.fingerprint


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
    if split and str(split) not in SPLITS:
        raise DataError(
            f"{where}: unknown split {split!r}: use train, validation or test, or name it with "
            f"--set splits.train={split}"
        )
    client, user = (columns.identity(row.get(key), key, where) for key in _IDS)
    label = columns.label(row.get("label"), where)
    ids = (("client_id", client), ("user_id", user))
    for key, value in (("text", text), ("prompt", prompt), ("label", label), *ids):
        if not _encodable(str(value)):
            raise DataError(f"{where}: {key} has half of a surrogate pair, which is no text")
    return Example(
        text,
        prompt,
        label,
        client,
        SPLITS.get(str(split)),
        choices,
        line,
        user,
    )


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
