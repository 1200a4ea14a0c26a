"""The charts of a comparison, as SVG and PNG."""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corolla.host.text import human_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision can tell apart; without the yellow."""
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
_SIZE = (6.4, 4.0)
"""Width and height of a chart, in inches."""
_DPI = 200

Entry = Mapping[str, Any]
Draw = Callable[[Any, Sequence[Entry]], None]


@dataclass(frozen=True)
class Chart:
    """A chart: the name of its files, what stands above and below it, how it is drawn."""

    name: str
    title: str
    caption: str
    draw: Draw


def charts(results: Mapping[str, Any]) -> Iterator[Chart]:
    """Every chart that has something to show."""
    seeds = len(results["seeds"])
    band = f"Mean of {seeds} seeds; the band reaches from the lowest to the highest." * (seeds > 1)
    shown = [e for e in results["methods"] if "curve" in e]
    if any(not e["personal"] and not e["baseline"] for e in shown):
        yield from _of_global_models(results, band)
    if any(e["personal"] for e in shown):
        own = "mean loss on clients' own examples"
        yield Chart("loss-personal", "Personal models", band, _curves("round", own, True))
    if any(len(e["search"]) > 1 for e in results["methods"]):
        caption = (
            "Mean loss on every second of the clients' own examples at the first seed; the chosen "
            "rate is ringed."
        )
        yield Chart("lr-search", "Search of the learning rate", caption, _search)
    if any(e["aggregation_errors"] for e in shown):
        caption = (
            "Relative distance of the new global update from the clients' weighted mean, on "
            "effective weights; one seed. Below 1e-6 is rounding."
        )
        yield Chart("aggregation-error", "Error of aggregation", caption, _errors)


def _of_global_models(results: Mapping[str, Any], band: str) -> Iterator[Chart]:
    """The held-out loss of global models against what it costs."""
    held, simulated = "held-out loss (nats per target)", results["simulated_seconds"]
    yield Chart("loss-rounds", "Loss against rounds", band, _curves("round", held, False))
    caption = f"{band} Up and down, mean over all clients; from round 1 on."
    yield Chart("loss-bytes", "Loss against bytes", caption, _curves("bytes", held, False))
    caption = f"{band} {'' if simulated else 'Training, without evaluation.'}"
    clock = "simulated seconds" if simulated else "seconds of the rounds"
    draw = _curves("seconds", held, False, clock)
    yield Chart("loss-seconds", "Loss against time", caption, draw)
    caption = "The line joins what no other method beats in both."
    if len(results["seeds"]) > 1:
        caption = f"Bars: 95 % intervals. {caption}"
    yield Chart("pareto", "Final loss against bytes", caption, _pareto(results["pareto"]))


def style(index: int) -> dict[str, Any]:
    """One look per method in all charts; colours repeat after seven, with another line."""
    number = len(COLOURS)
    return {
        "color": COLOURS[index % number],
        "marker": _MARKERS[index % number],
        "linestyle": _DASHES[index // number % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def render(draw: Draw, methods: Sequence[Entry]) -> tuple[str, bytes]:
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


def _curves(key: str, ylabel: str, personal: bool, xlabel: str = "") -> Draw:
    def draw(axes: Any, methods: Sequence[Entry]) -> None:
        skip = 1 if key == "bytes" else 0  # zero has no place on a logarithmic axis
        for index, e in enumerate(methods):
            if "curve" not in e or e["personal"] != personal:
                continue
            if key == "bytes" and e["baseline"]:  # what a baseline is does not travel
                continue
            curve = e["curve"][skip:]
            x = [point[key] for point in curve]
            look = style(index)
            axes.plot(x, [point["loss"] for point in curve], label=_text(e["label"]), **look)
            low, high = [p["low"] for p in curve], [p["high"] for p in curve]
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=xlabel or key, ylabel=ylabel)
        if key == "round":
            _whole(axes)
        if key == "bytes":
            _byte_axis(axes)

    return draw


def _pareto(front: Sequence[str]) -> Draw:
    def draw(axes: Any, methods: Sequence[Entry]) -> None:
        shown = {e["label"]: e for e in methods if e.get("loss") and not e["baseline"]}
        line = [(shown[label]["bytes"], shown[label]["loss"]["mean"]) for label in front]
        axes.plot(*zip(*line, strict=True), color="#9aa5b1", linewidth=1, zorder=1)
        for index, e in enumerate(methods):
            if e["label"] not in shown:
                continue
            loss, look = e["loss"], {**style(index), "linestyle": "", "markersize": 8}
            half = None if loss["high"] is None else loss["high"] - loss["mean"]
            axes.errorbar(
                e["bytes"], loss["mean"], yerr=half, capsize=3, label=_text(e["label"]), **look
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
        look = style(index)
        axes.plot(*zip(*rows, strict=True), label=_text(e["label"]), **look)
        best = dict(rows)[e["lr"]]
        axes.plot(e["lr"], best, "o", markersize=12, markerfacecolor="none", color=look["color"])
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
                rounds, [max(x, 1e-9) for x in errors], label=_text(e["label"]), **style(index)
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
