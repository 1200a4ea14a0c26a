"""Rows of text: one example each, from wherever they come."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from corolla.data import forms
from corolla.data.files import columns, sources
from corolla.data.files.sources import SPLITS, Reading, Source
from corolla.data.forms import Turn, encodable
from corolla.errors import DataError

_IDS = ("client_id", "user_id")
_TELLING = frozenset(
    {
        *("system", "context", "input", "history", "instruction", "messages", "conversations"),
        *("tools", "completion", "output", "chosen", "rejected"),
    }
)
"""Columns that change what a row means; where one is not used, people are told."""
_PLAIN = ("text", "prompt", "response")
_ANSWERED = ("prompt", "answer", "choices")


@dataclass(frozen=True, slots=True)
class Example:
    """One row. Exactly one of: text; prompt and text (the response); text and label; turns.

    With `choices`, the response is the right one of them. Two turns with nothing beside them are
    prompt and text, whichever form they came in; with `turns` text is empty.
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
    turns: tuple[Turn, ...] = ()
    """A conversation that ends with an answer; () for rows of other forms."""
    tools: str = ""
    """Descriptions of the tools of a conversation, as the JSON text of a list."""
    unused: frozenset[str] = field(default=frozenset(), compare=False)
    """Columns of its row that change the meaning of such rows, and were not used."""

    @property
    def dialogue(self) -> tuple[Turn, ...]:
        """The turns of a conversation, or of prompt and response; () without a prompt."""
        if self.turns or self.prompt is None:
            return self.turns
        return Turn("user", self.prompt), Turn("assistant", self.text, learnt=True)

    @property
    def last(self) -> int:
        """The index of the last answer in the dialogue, before calls of tools; -1 without."""
        own = self.dialogue
        said = [i for i, turn in enumerate(own) if turn.learnt]
        return next((i for i in reversed(said) if not own[i].calls), max(said, default=-1))

    @property
    def question(self) -> str | None:
        """The question: the content of the turn before the last answer; None without a dialogue."""
        if not self.dialogue:
            return None
        return self.dialogue[self.last - 1].content if self.last else ""

    @property
    def answer(self) -> str:
        """The last answer, or the text."""
        return self.dialogue[self.last].content if self.dialogue else self.text

    def shortened(self, most: int) -> "Example":
        """The start of the row: of prompt and text, or of all turns together, `most` characters."""
        prompt = None if self.prompt is None else self.prompt[:most]
        turns, left = [], most
        for turn in self.turns:
            own = len(turn.content) + len(turn.more)
            if own > left and turn.more:  # half of its JSON text is none
                break
            turns.append(replace(turn, content=turn.content[:left]))
            left -= own + 1
            if left <= 0:
                break
        return replace(self, text=self.text[:most], prompt=prompt, turns=tuple(turns))

    @property
    def size(self) -> int:
        """Characters of its longest part, which `shortened` cuts."""
        told = sum(len(turn.content) + len(turn.more) for turn in self.turns)
        return max(len(self.text), told)

    def content(self) -> dict[str, Any]:
        """All fields that say what the row is, wherever it stands."""
        left_out = {"line", "unused", "turns", "tools"}
        left_out |= {"user"} if self.user is None else set()
        names = [own.name for own in fields(self) if own.name not in left_out]
        found = {name: getattr(self, name) for name in names}
        if self.turns:
            found |= {"turns": [vars(turn) for turn in self.turns], "tools": self.tools}
        return found


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
    """The rows of a source, in memory. Raises DataError naming the row that cannot be used."""
    reading, unused = Reading(), Counter[str]()
    return rows_of(source, list(examples(source, reading, unused)), reading, unused)


def examples(source: Source, reading: Reading, unused: Counter[str]) -> Iterator[Example]:
    """The rows of a source one by one; `reading` and `unused` are filled meanwhile."""
    for row, where, line in sources.rows(source, reading):
        try:
            example = _example(row, where, line)
        except DataError as error:
            raise DataError(f"{error}{sources.hint(row)}") from None
        unused.update(example.unused)
        yield example


def rows_of(source: Source, found: list[Example], reading: Reading, unused: Counter[str]) -> Rows:
    """All rows of a source that has been read. Raises DataError where there are none."""
    if not found:
        left = ", ".join(f"{split} ({n})" for split, n in reading.unread.items())
        rest = f" of the splits that are asked for: it has {left}" if left else ""
        raise DataError(f"{source.name} has no rows{rest}")
    return Rows(found, reading.fingerprint or _fingerprint(found), reading, unused)


def _fingerprint(examples: Sequence[Example]) -> str:
    """The sha256 of rows that were read from no bytes of their own: of a JSON array of them."""
    digest = hashlib.sha256(b"[")
    for place, row in enumerate(examples):
        digest.update((", " if place else "").encode())
        digest.update(json.dumps(row.content(), sort_keys=True).encode())
    digest.update(b"]")
    return digest.hexdigest()


def read_rows(name: str) -> tuple[list[Example], str]:
    """The rows of a source with its own names, and the sha256 of its content, as `read` has them.

    Raises DataError naming the row that cannot be used.
    """
    found = read(Source(name))
    return found.examples, found.fingerprint


def _example(row: Any, where: str, line: int = 0) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    said, used = _said(row, where)
    split = row.get("split") or ""
    if split and str(split) not in SPLITS:
        raise DataError(
            f"{where}: unknown split {split!r}: use train, validation or test, or name it with "
            f"--set splits.train={split}"
        )
    client, user = (columns.identity(row.get(key), key, where) for key in _IDS)
    label = columns.label(row.get("label"), where)
    ids = (("client_id", client), ("user_id", user))
    texts = (("text", said["text"]), ("prompt", said.get("prompt")), ("tools", said.get("tools")))
    for key, value in (*texts, ("label", label), *ids):
        if value is not None and not encodable(value):
            raise DataError(f"{where}: {key} has half of a surrogate pair, which is no text")
    return Example(
        label=label,
        client=client,
        split=SPLITS.get(str(split)),
        line=line,
        user=user,
        unused=frozenset(n for n in _TELLING & row.keys() if n not in used and _tells(row[n])),
        **said,
    )


def _said(row: dict[str, Any], where: str) -> tuple[dict[str, Any], Collection[str]]:
    """(the fields of an Example that say what it is, the names of the columns they come from)."""
    answers = "answer" in row and not {"text", "response"} & row.keys()
    if answers and {"prompt", "question"} & row.keys():
        return _answered(row, where)
    plain = row.get("text") is not None or (
        row.get("prompt") is not None and row.get("response") is not None
    )
    if not plain and (found := forms.conversation(row, where)):
        conversation, used = found
        if pair := conversation.pair:
            return {"text": pair[1], "prompt": pair[0]}, used
        return {"text": "", "turns": conversation.turns, "tools": conversation.tools}, used
    if ("response" in row) != ("prompt" in row) or ("prompt" in row and "text" in row):
        raise DataError(f"{where}: needs both prompt and response, or text alone")
    return _pair(row.get("text", row.get("response")), row.get("prompt"), row, where), _PLAIN


def _pair(text: Any, prompt: Any, row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of text, or of prompt and response. Raises DataError for what is no string."""
    if not isinstance(text, str) or ("text" not in row and not isinstance(prompt, str)):
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise DataError(
            f"{where}: needs text, or prompt and response, as strings, or messages; found {found}"
        )
    return {"text": text, "prompt": prompt}


def _tells(value: Any) -> bool:
    """Returns whether a column has something in this row: no gap of a table has."""
    return isinstance(value, str | list | dict) and bool(value)


def _answered(row: dict[str, Any], where: str) -> tuple[dict[str, Any], Collection[str]]:
    """`_said` of a row with a prompt or a question, an answer, and choices if any."""
    if "prompt" in row:
        prompt, used = row["prompt"], frozenset(_ANSWERED)
    else:
        prompt, used = forms.asked(row, where), frozenset((*_ANSWERED, "question", "context"))
    answer, choices = row["answer"], row.get("choices")
    if choices is None:
        return _pair(answer, prompt, row, where), used
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: choices must be a list of at least two strings")
    for choice in choices:
        if not isinstance(choice, str) or not choice or not encodable(choice):
            raise DataError(f"{where}: choices must be strings that are not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be the index of a choice, 0 to {len(choices) - 1}, "
            f"found {answer!r}"
        )
    said = _pair(choices[answer], prompt, row, where)
    return {**said, "choices": tuple(choices)}, used


def check_one_kind(rows: Sequence[Example], name: str) -> None:
    """Raises DataError where rows of different kinds are mixed: `name` is that of their file."""
    labelled = sum(row.label is not None for row in rows)
    if labelled not in (0, len(rows)):
        raise DataError(f"{name}: {labelled} of {len(rows)} rows have a label; all or none must")
    if labelled and any(row.dialogue for row in rows):
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
