"""The keys of the configuration for people, pages and scripts: all, some, or one in full."""

import shlex
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla.config import keys as config_keys
from corolla.config.keys import CLASSES, NAME, Key
from corolla.config.mistakes import MEANINGS, meant
from corolla.errors import ConfigError

_HEADER = """# All keys of the configuration

Written by `corolla keys --markdown` from the fields themselves; `corolla keys WORD` tells the same
of one key, or finds those whose name or text has a word. A key is given as `--set KEY=VALUE`, or
stands in a TOML file (`--config`) under the same name, with `-` or `_`. An option of the command
and `--set` hold before the file, and may not contradict each other. "By default" is what a run
takes where nothing is given; `null` is for `--set`: in a file the key is left out.
"""
_WIDTH = 24
"""Columns of the longest names: those of options and of classes."""

_REFUSED = "\nRefused, shown with the example of each key:\n\n"


def find(word: str) -> list[Key]:
    """The key of that name, or what other tools call it; else all of a group, or with the word.

    Raises ConfigError, with the nearest name, where nothing has it.
    """
    known = config_keys.table()
    asked = word.strip().replace("-", "_").replace(" ", "_").lower()
    if grouped := [key for key in known if key.group == asked]:
        return grouped
    of_class = f"{CLASSES}.{NAME}.{asked.rpartition('.')[2]}" if asked.count(".") == 2 else None
    for name in (asked, MEANINGS.get(asked), of_class):
        if named := [key for key in known if key.name == name]:
            return named
    if asked and (found := [key for key in known if _has(key, asked)]):
        return found
    near = meant(word, [key.name for key in known])
    hint = f": {near}" if near else ", and none is like it: corolla keys lists all"
    raise ConfigError(f"no key has {word!r} in its name or text{hint}")


def _has(key: Key, word: str) -> bool:
    return word in key.name or word.replace("_", " ") in key.text.lower()


def print_keys(console: Console, found: Sequence[Key]) -> None:
    """Keys as tables, one for each group."""
    titles = config_keys.titles()
    for group, members in groupby(found, key=lambda key: key.group):
        table = Table(box=box.SIMPLE_HEAD, title=f"{group}: {titles[group]}", title_justify="left")
        table.add_column("key", no_wrap=True, min_width=_WIDTH)
        table.add_column("what it is, its type, its value by default")
        for key in members:
            about = f"{key.kind}; by default {key.usual}"
            table.add_row(key.name, f"{escape(key.text)}\n[dim]{escape(about)}[/]")
        console.print(table)


def print_key(console: Console, key: Key) -> None:
    """One key in full."""
    console.print(f"[bold]{key.name}[/]: {escape(key.text)}", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    rows = [("group", key.group), ("type", key.kind), ("by default", key.usual)]
    rows += [("example", _options(key))]
    rows += [(f"not with {other}", why) for other, why in key.refusals().items()]
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table, highlight=False)


def markdown() -> str:
    """A page of all keys, group by group."""
    titles = config_keys.titles()
    page = [_HEADER]
    for group, members in groupby(config_keys.table(), key=lambda key: key.group):
        page.append(f"\n## {group}\n\n{titles[group]}\n\n" + _rows(list(members)))
    return "".join(page)


def _rows(members: Sequence[Key]) -> str:
    head = "| key | type | by default | what it is | example |\n|---|---|---|---|---|\n"
    lines = ["| " + " | ".join(_cells(key)) + " |\n" for key in members]
    refused = [
        f"- `{key.name}` with `{other}`: {why}\n"
        for key in members
        for other, why in key.refusals().items()
    ]
    return head + "".join(lines) + (_REFUSED + "".join(refused) if refused else "")


def _cells(key: Key) -> list[str]:
    """A cell for each column; a bar would begin another."""
    cells = [f"`{key.name}`", key.kind, key.usual, key.text, f"`{_options(key)}`"]
    return [cell.replace("|", "\\|") for cell in cells]


def _options(key: Key) -> str:
    """The example as a command takes it, with what it needs."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in key.settings)
