"""A comparison for people: report.html without links, plots as PNG and SVG, a CSV, a table."""

import csv
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from corolla.embedded.assets import asset
from corolla.host.files import write_atomic
from corolla.host.text import human_bytes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision can tell apart; without the yellow."""
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
_SIZE = (6.4, 4.0)
_DPI = 200

Entry = Mapping[str, Any]
Draw = Callable[[Any, Sequence[Entry]], None]


def write_comparison(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, results.csv, plots/ and report.html from `comparison.results`."""
    (folder / "plots").mkdir(exist_ok=True)
    write_atomic(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomic(folder / "results.csv", _csv(results).encode())
    charts = []
    for name, title, caption, draw in _charts(results):
        svg, png = _render(draw, results["methods"])
        write_atomic(folder / "plots" / f"{name}.svg", svg.encode())
        write_atomic(folder / "plots" / f"{name}.png", png)
        charts.append((title, caption, svg[svg.index("<svg") :]))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        asset("comparison.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        r=results,
        size=human_bytes,
        interval=interval,
        number=_number,
        charts=charts,
        sentences=sentences(results),
        colour={e["label"]: _style(i)["color"] for i, e in enumerate(results["methods"])},
        config=results["plan"]["methods"][0]["config"],
    )
    write_atomic(folder / "report.html", page.encode())


def interval(value: Entry | None, digits: int = 4, scale: float = 1.0) -> str:
    """'3.250 ± 0.012': a mean and half its 95 % interval; the mean alone for one seed."""
    if value is None:
        return "–"
    centre = f"{scale * value['mean']:.{digits}f}"
    if value["high"] is None:
        return centre
    return f"{centre} ± {scale * (value['high'] - value['mean']):.{digits}f}"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What may be said of each method beside the first, in words."""
    said = []
    for key, what in (("held_out", "held-out loss"), ("own", "loss on the clients' own examples")):
        table = results[key]
        if table is None or (key == "own" and not any(e["personal"] for e in results["methods"])):
            continue
        for row in table["rows"]:
            pair = f"{row['label']} and {table['reference']}"
            n = row["difference"]["n"]
            if row["verdict"]:
                said.append(
                    f"{row['label']} has a {row['verdict']} {what} than {table['reference']}: by "
                    f"{abs(row['difference']['mean']):.4f} (paired over {n} seeds, "
                    f"p = {row['p_holm']:.2g} after Holm's correction)."
                )
            elif n < 2:
                said.append(f"{pair}: one seed, so nothing is said of their {what}.")
            else:
                why = (
                    f"p = {row['p_holm']:.2g} after Holm's correction"
                    if row["intervals_apart"]
                    else "their intervals overlap"
                )
                said.append(f"{pair}: no difference in {what} is shown ({why}, {n} seeds).")
    return said


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
    seeds = len(results["seeds"])
    over = f"mean ± half the 95 % interval, {seeds} seeds" if seeds > 1 else "one seed"
    quality = _table(
        f"Loss ({over})", "lr", "held-out", "clients' own", "equal bytes", "equal time"
    )
    private = any(e.get("epsilon") is not None for e in results["methods"])
    costs = _table(
        "Costs of a run",
        *("bytes a client", "seconds", "CPU s", "memory", "aggregation error"),
        *(["ε"] if private else []),
    )
    for e in results["methods"]:
        label = escape(e["label"]) + (" (personal)" if e["personal"] else "")
        if "curve" not in e:
            quality.add_row(label, "failed")
            continue
        quality.add_row(
            label,
            f"{e['lr']:g}" + {"lowest": " ↓", "highest": " ↑", None: ""}[e["edge"]],
            interval(e["loss"], 3),
            interval(e["own_loss"], 3),
            _met(e["at_bytes"]),
            _met(e["at_seconds"]),
        )
        errors = e["aggregation_errors"]
        costs.add_row(
            label,
            human_bytes(e["bytes"]),
            _number(e["seconds"]) + (" †" if e["beside"] else ""),
            _number(e["cpu_seconds"], 0),
            human_bytes(e["peak_rss"]),
            f"{max(errors):.1e}" if errors else "–",
            *([_number(e["epsilon"], 3)] if private else []),
        )
    console.print(quality, costs)
    if any(e.get("beside") for e in results["methods"]):
        console.print("† runs shared the machine: rather compare CPU seconds", style="dim")
    if any((e.get("at_bytes") or {}).get("within_first_round") for e in results["methods"]):
        console.print(
            "* the budget does not pay for the method's first measured round", style="dim"
        )
    for sentence in sentences(results):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    edges = [e["label"] for e in results["methods"] if e["edge"]]
    if edges:
        console.print(
            f"[yellow]best lr at the edge of the grid (↓ ↑):[/] {escape(', '.join(edges))}: "
            f"extend --lrs before you conclude anything",
            soft_wrap=True,
        )
    for text in results["unequal"]:
        console.print(f"[red]unequal terms:[/] {escape(text)}", soft_wrap=True)
    for name, line in results["failed"].items():
        console.print(f"[red]failed:[/] {escape(name)}: {escape(line)}", soft_wrap=True)
    console.print(f"report  {escape(str(folder / 'report.html'))}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _met(value: Entry | None) -> str:
    """A loss at an equal price; * where the price does not pay for one round."""
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (" *" if value["within_first_round"] else "")


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _csv(results: Mapping[str, Any]) -> str:
    """One row for each method, seed and measured round."""
    columns = ("method", "strategy", "personal", "lr", "seed")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow((*columns, "round", "bytes_per_client", "seconds", "loss"))
    for e in results["methods"]:
        for run in e.get("runs", ()):
            row = (e["label"], e["strategy"], e["personal"], e["lr"], run["seed"])
            writer.writerows((*row, *p.values()) for p in run["points"])
    return buffer.getvalue()


def _charts(results: Mapping[str, Any]) -> list[tuple[str, str, str, Draw]]:
    """(file name, title, caption, how to draw) of each chart that has something to show."""
    clock = "simulated seconds" if results["simulated_seconds"] else "seconds of the rounds"
    seeds = len(results["seeds"])
    band = f"Mean of {seeds} seeds; the band reaches from the lowest to the highest." * (seeds > 1)
    shown = [e for e in results["methods"] if "curve" in e]
    held = "held-out loss (nats per target)"
    charts: list[tuple[str, str, str, Draw]] = []
    if any(not e["personal"] for e in shown):
        charts += [
            ("loss-rounds", "Loss against rounds", band, _curves("round", held, False)),
            (
                "loss-bytes",
                "Loss against bytes",
                f"{band} Up and down, mean over all clients; from round 1 on.",
                _curves("bytes", held, False),
            ),
            (
                "loss-seconds",
                "Loss against time",
                f"{band} {'' if results['simulated_seconds'] else 'Training, without evaluation.'}",
                _curves("seconds", held, False, clock),
            ),
            (
                "pareto",
                "Final loss against bytes",
                "Bars: 95 % intervals. The line joins what no other method beats in both."
                if seeds > 1
                else "The line joins what no other method beats in both.",
                _pareto(results["pareto"]),
            ),
        ]
    if any(e["personal"] for e in shown):
        own = "mean loss on clients' own examples"
        charts.append(
            ("loss-personal", "Personal models", band, _curves("round", own, True)),
        )
    if any(len(e["search"]) > 1 for e in results["methods"]):
        charts.append(
            (
                "lr-search",
                "Search of the learning rate",
                "Mean loss on the clients' own validation examples at the first seed; the chosen "
                "rate is ringed.",
                _search,
            )
        )
    if any(e["aggregation_errors"] for e in shown):
        charts.append(
            (
                "aggregation-error",
                "Error of aggregation",
                "Relative distance of the new global update from the clients' weighted mean, on "
                "effective weights; one seed. Below 1e-6 is rounding.",
                _errors,
            )
        )
    return charts


def _style(index: int) -> dict[str, Any]:
    """One look per method in all charts; colours repeat after seven, with another line."""
    number = len(_COLOURS)
    return {
        "color": _COLOURS[index % number],
        "marker": _MARKERS[index % number],
        "linestyle": _DASHES[index // number % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _curves(key: str, ylabel: str, personal: bool, xlabel: str = "") -> Draw:
    def draw(axes: Any, methods: Sequence[Entry]) -> None:
        skip = 1 if key == "bytes" else 0  # zero has no place on a logarithmic axis
        for index, e in enumerate(methods):
            if "curve" not in e or e["personal"] != personal:
                continue
            curve = e["curve"][skip:]
            x = [point[key] for point in curve]
            style = _style(index)
            axes.plot(x, [point["loss"] for point in curve], label=_text(e["label"]), **style)
            low, high = [p["low"] for p in curve], [p["high"] for p in curve]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=xlabel or key, ylabel=ylabel)
        if key == "round":
            _whole(axes)
        if key == "bytes":
            _byte_axis(axes)

    return draw


def _pareto(front: Sequence[str]) -> Draw:
    def draw(axes: Any, methods: Sequence[Entry]) -> None:
        shown = {e["label"]: e for e in methods if e.get("loss")}
        line = [(shown[label]["bytes"], shown[label]["loss"]["mean"]) for label in front]
        axes.plot(*zip(*line, strict=True), color="#9aa5b1", linewidth=1, zorder=1)
        for index, e in enumerate(methods):
            if e["label"] not in shown:
                continue
            loss, style = e["loss"], {**_style(index), "linestyle": "", "markersize": 8}
            half = None if loss["high"] is None else loss["high"] - loss["mean"]
            axes.errorbar(
                e["bytes"], loss["mean"], yerr=half, capsize=3, label=_text(e["label"]), **style
            )
        axes.set(ylabel="final held-out loss (nats per target)")
        _byte_axis(axes)

    return draw


def _search(axes: Any, methods: Sequence[Entry]) -> None:
    for index, e in enumerate(methods):
        rows = sorted(
            (row["lr"], row["own_loss"]) for row in e["search"] if row["own_loss"] is not None
        )
        if not rows:
            continue
        style = _style(index)
        axes.plot(*zip(*rows, strict=True), label=_text(e["label"]), **style)
        best = dict(rows)[e["lr"]]
        axes.plot(e["lr"], best, "o", markersize=12, markerfacecolor="none", color=style["color"])
    from matplotlib.ticker import NullLocator

    axes.set(xlabel="learning rate", ylabel="mean loss of clients, validation", xscale="log")
    tried = sorted({row["lr"] for e in methods for row in e["search"]})
    axes.set_xticks(tried, [f"{lr:g}" for lr in tried], rotation=45 if len(tried) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())


def _errors(axes: Any, methods: Sequence[Entry]) -> None:
    for index, e in enumerate(methods):
        if errors := e.get("aggregation_errors"):
            rounds = range(1, len(errors) + 1)
            axes.plot(
                rounds, [max(x, 1e-9) for x in errors], label=_text(e["label"]), **_style(index)
            )
    axes.set(xlabel="round", ylabel="relative error of the aggregate", yscale="log")
    _whole(axes)


def _whole(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _byte_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", xlabel="bytes per client, up and down")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_bytes(x).replace(".0", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _text(label: str) -> str:
    """A name without mathematics, and not hidden as names that begin with _ are."""
    return label.replace("$", r"\$") if not label.startswith("_") else " " + label


def _render(draw: Draw, methods: Sequence[Entry]) -> tuple[str, bytes]:
    """One chart as SVG, whose text stays text, and as PNG. Uses no global figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": "corolla",
        "svg.fonttype": "none",
        "font.size": 9.5,
        "axes.edgecolor": "#6b7785",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6eaee",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, methods)
        handles, labels = axes.get_legend_handles_labels()
        columns = min(4, max(1, len(labels)))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # it stays as laid out: that takes half of the time
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()
