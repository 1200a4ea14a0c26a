"""The terminal view of a comparison: a bar over cells, then tables and what may be said."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from corolla.artefacts.sizes import sizes
from corolla.commands.compare.plots import Entry
from corolla.commands.compare.report import interval, number, sentences
from corolla.host.text import human_bytes

_LABEL = 10
"""Columns that a name has at least: a longer one takes several lines rather than cut numbers."""


class CellBars:
    """A bar over cells on a terminal; one line a cell elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self.progress.add_task("cells", total=None, note="")

    def __call__(self, done: int, total: int, running: Sequence[str], note: str) -> None:
        shown = escape(", ".join(running))
        self.progress.update(self._task, completed=done, total=total, note=shown)
        if note:
            self.console.print(f"{done}/{total}  {escape(note)}", highlight=False, soft_wrap=True)


def print_comparison(console: Console, results: Mapping[str, Any], folder: Path) -> None:
    """The summary tables, what may be said, and what went wrong."""
    methods = results["methods"]
    console.print(_quality(results), _costs(methods))
    if any(e.get("served") for e in methods):
        console.print(_ranks(methods))
    if any(e.get("beside") for e in methods):
        console.print("† runs shared the machine: rather compare CPU seconds", style="dim")
    if any((e.get("at_bytes") or {}).get("within_first_round") for e in methods):
        console.print(
            "* the budget does not pay for the method's first measured round", style="dim"
        )
    for sentence in sentences(results):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    edges = [e["label"] for e in methods if e["edge"]]
    if edges:
        console.print(
            f"[yellow]best lr at the edge of the grid (↓ ↑):[/] {escape(', '.join(edges))}: "
            f"extend --lrs before you conclude anything",
            soft_wrap=True,
        )
    for e in methods:
        for warning in e.get("warnings", ()):
            console.print(
                f"[yellow]warning:[/] {escape(e['label'])}, seed {warning['seed']}: "
                f"{escape(warning['text'])}",
                soft_wrap=True,
                highlight=False,
            )
    for text in results["unequal"]:
        console.print(f"[red]unequal terms:[/] {escape(text)}", soft_wrap=True)
    for name, line in results["failed"].items():
        console.print(f"[red]failed:[/] {escape(name)}: {escape(line)}", soft_wrap=True)
    console.print(f"report  {escape(str(folder / 'report.html'))}", soft_wrap=True)


def _quality(results: Mapping[str, Any]) -> Table:
    """Losses of all methods; one that failed is named."""
    seeds = len(results["seeds"])
    over = f"mean ± half the 95 % interval, {seeds} seeds" if seeds > 1 else "one seed"
    table = _table(f"Loss ({over})", "lr", "held-out", "clients' own", "equal bytes", "equal time")
    for e in results["methods"]:
        if "curve" not in e:
            table.add_row(_label(e), "failed")
            continue
        table.add_row(
            _label(e),
            f"{e['lr']:g}" + {"lowest": " ↓", "highest": " ↑", None: ""}[e["edge"]],
            interval(e["loss"], 3),
            interval(e["own_loss"], 3),
            _met(e["at_bytes"]),
            _met(e["at_seconds"]),
        )
    return table


def _costs(methods: Sequence[Entry]) -> Table:
    """Returns the table of what a run of each method that has finished costs."""
    private = any(e.get("epsilon") is not None for e in methods)
    columns = ["bytes a client", "seconds", "CPU s", "memory", "aggregation error"]
    table = _table("Costs of a run", *columns, *(["ε"] if private else []))
    for e in methods:
        if "curve" not in e:
            continue
        errors = e["aggregation_errors"]
        table.add_row(
            _label(e),
            "–" if e["baseline"] else human_bytes(e["bytes"]),
            number(e["seconds"]) + (" †" if e["beside"] else ""),
            number(e["cpu_seconds"], 0),
            human_bytes(e["peak_rss"]),
            f"{max(errors):.1e}" if errors else "–",
            *([number(e["epsilon"], 3)] if private else []),
        )
    return table


def _ranks(methods: Sequence[Entry]) -> Table:
    """Returns the table of what runs end in; of several seeds the one whose served/ lost most."""
    table = _table("Adapters that runs end in", "adapter/", "served/")
    for e in methods:
        if told := e.get("served"):
            exact, small = sizes(told)
            table.add_row(_label(e), exact, small or "adapter/ itself")
    return table


def _label(e: Entry) -> str:
    return escape(e["label"]) + (" (personal)" if e["personal"] else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("", overflow="fold", min_width=_LABEL)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _met(value: Entry | None) -> str:
    """A loss at an equal price; * where the price does not pay for one round."""
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (" *" if value["within_first_round"] else "")
