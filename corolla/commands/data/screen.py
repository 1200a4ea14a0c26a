"""The terminal view of a data set."""

from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from corolla.commands.data.look import Look
from corolla.commands.warned import say_warning
from corolla.config.run import RunConfig
from corolla.data import census
from corolla.data.census import Census
from corolla.data.files.columns import COLUMNS

_FEW = 8
"""Clients, labels or columns that are named, the largest first."""


def counted(console: Console, what: Iterable[int], total: int) -> Iterator[int]:
    """Gives numbers on, with a bar that says how many have been."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("lengths", total=total)
        for value in what:
            yield value
            progress.advance(task)


def print_look(console: Console, found: Look, config: RunConfig) -> None:
    """Prints how the data are read and what is learnt from them, then what should be known."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_read(found), *_dealt(found, config), *_lengths(found, config)]:
        table.add_row(name, escape(value))
    console.print(table, highlight=False)
    if found.example:
        label = f", label {found.example.label}" if found.example.label is not None else ""
        console.print(
            f"a row of {escape(found.example.client + label)}, as tokens: what is learnt is "
            f"between » and «",
            style="dim",
            highlight=False,
        )
        parts = (
            f"[bold green]»{escape(text)}«[/]" if learnt else escape(text)
            for text, learnt in found.example.parts
        )
        console.print("".join(parts), highlight=False, soft_wrap=True)
    for why, instead in found.data.notes:
        say_warning(console, f"{why}: {instead}" if instead else why)


def _read(found: Look) -> Iterator[tuple[str, str]]:
    reading, rows = found.rows.reading, found.rows
    yield "data", f"{found.data.name}, sha256 {found.data.fingerprint[:16]}…"
    ignored = f"; {reading.ignored} other files are not read" if reading.ignored else ""
    yield "read as", reading.told() + ignored
    yield "rows", f"{len(rows.examples):,}: {_named(found.forms, len(found.forms))}"
    if reading.unread:
        yield "splits not asked for", _named(reading.unread)
    known = {name: n for name, n in reading.columns.items() if name in COLUMNS}
    used = {name: n for name, n in known.items() if rows.unused[name] < n}
    yield "columns used", _named(used, len(used))
    other = {name: n for name, n in reading.columns.items() if name not in used}
    if other:
        yield "columns not used", _named(other)


def _dealt(found: Look, config: RunConfig) -> Iterator[tuple[str, str]]:
    data = found.data
    sizes = {client: len(split.train) for client, split in data.clients.items()}
    most, least = max(sizes.values()), min(sizes.values())
    each = f"{least:,}" if most == least else f"{least:,} to {most:,}"
    yield "clients", f"{len(sizes):,} with {each} training rows: {_named(sizes)}"
    if data.left_out:
        yield "left out", f"{data.left_out} clients with less than {config.min_examples} rows"
    if data.without:
        shown = ", ".join(data.without[:_FEW]) + (", …" if len(data.without) > _FEW else "")
        yield "left out, no target", shown
    own = sum(len(split.eval) for split in data.clients.values())
    same = ", clients' own" if data.validation_reported else ""
    yield "held out", f"{len(data.heldout):,} rows{same}; {own:,} validation rows of clients"
    if found.labels:
        yield "labels", _named(found.labels, 20)
    twice = found.duplicates
    yield (
        "duplicates",
        f"{twice.within:,} training rows within a client, {twice.across:,} across clients, "
        f"{twice.held_out:,} held-out or validation rows that are trained on",
    )


def _lengths(found: Look, config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "lengths", census.told({"of": found.drawn_of, **found.training.to_json()})
    held = found.held_out
    if held.tokens and held.to_json()["longer"]:
        yield "held-out lengths", _held(held)
    lost = found.training.lost
    share = lost / max(1, lost + found.training.targets)
    rest = f", {lost:,} ({share:.1%}) lost to max-length={config.max_length}" if lost else ""
    what = "labels" if found.labels else "tokens"
    yield "learnt from", f"{found.training.targets:,} {what}{rest}"


def _held(held: Census) -> str:
    return (
        f"{len(held.tokens)} rows: {held.split} become several sequences, {held.cut} are cut, "
        f"{held.dropped + held.blank} have no target"
    )


def _named(counts: Mapping[str, int], most: int = _FEW) -> str:
    """Names with their counts, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({n:,})" for name, n in ordered[:most]) + (
        ", …" if len(ordered) > most else ""
    )
