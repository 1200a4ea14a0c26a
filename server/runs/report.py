"""report.html: one file without links to anything, for people who would rather look than read."""

import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.drift.interval import sentence
from corolla.embedded.pages import inline, render_page
from corolla.evaluation.scoring import SHARES
from corolla.host.files import write_atomic
from corolla.host.text import human_bytes

_SHOWN_CLIENTS = 40
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes"))


def write_report(path: Path, info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of a run from what run.json and metrics.jsonl hold."""
    page = render_page(
        "report.html.j2",
        called=Path(info["config"]["data"]).name or info["config"]["data"],
        size=human_bytes,
        change=sentence,
        number=_number,
        info=info,
        lines=lines,
        charts=[
            ("Loss per round", _losses(info, lines)),
            ("Bytes per round", _bytes(lines)),
            ("Seconds per round", _seconds(lines)),
            ("Privacy spent", _epsilon(info, lines)),
            ("Loss per client", _client_losses(info)),
        ],
        samples=_samples(info.get("samples")),
        measured=_measured(info),
        troubles=_troubles(lines),
        shares=SHARES,
    )
    write_atomic(path, page)


def _samples(told: Mapping[str, Sequence[Any]] | None) -> list[tuple[Any, Any]] | None:
    """(before, after) of each held-out row; None where they may not be told."""
    return None if told is None else list(zip(told["before"], told["after"], strict=True))


def _troubles(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about replies that were refused and rounds that were tried again, if any were."""
    verdicts: Counter[str] = Counter()
    for line in lines:
        verdicts.update(line.get("verdicts", {}))
    told = []
    if verdicts.keys() - {"accepted"}:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(verdicts.items()))
        told.append(f"Replies: {counts}.")
    if tried := [f"{line['round']} ({line['attempt']})" for line in lines if line.get("attempt")]:
        told.append(f"Rounds tried again (attempts that were abandoned): {', '.join(tried)}.")
    return told


def _measured(info: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(client, loss before, loss after), the largest gain first."""
    rows = [
        (name, scores["base"]["loss"], scores["final"]["loss"])
        for name, scores in info["clients"].items()
        if "loss" in scores["base"] and "loss" in scores["final"]
    ]
    return sorted(rows, key=lambda row: row[2] - row[1])


def _losses(info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        told = [line for line in lines if line["train_loss"] is not None]
        trained = [line["train_loss"] for line in told]
        if told:  # with differential privacy nobody says it
            axes.plot([line["round"] for line in told], trained, "o-", label="training")
        due = [line for line in lines if line["eval_loss"] is not None]
        held = [info["base"]["loss"], *(line["eval_loss"] for line in due)]
        axes.plot([0, *(line["round"] for line in due)], held, "s-", label="held out")
        axes.axhline(info["base"]["loss"], ls=":", color="grey", label="base model, held out")
        axes.set(xlabel="round", ylabel="loss (nats per target)")
        _whole_rounds(axes)
        axes.legend(frameon=False)

    return _svg(draw)


def _client_losses(info: Mapping[str, Any]) -> str:
    rows = _measured(info)[:_SHOWN_CLIENTS]
    if not rows:
        return ""

    def draw(axes: Any) -> None:
        places = range(len(rows))
        axes.hlines(places, [r[2] for r in rows], [r[1] for r in rows], color="lightgrey", lw=3)
        axes.plot([r[1] for r in rows], places, "o", label="base model")
        axes.plot([r[2] for r in rows], places, "s", label="fine-tuned")
        axes.set_yticks(list(places), [_label(r[0]) for r in rows], fontsize=7)
        axes.set(xlabel="loss on the client's own held-out examples")
        axes.invert_yaxis()
        axes.legend(frameon=False)

    return _svg(draw, height=max(3.0, 0.22 * len(rows) + 1))


def _label(name: str) -> str:
    """A client's name as a chart can show it: short, printable, without mathematics."""
    shown = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return shown if len(shown) <= 32 else shown[:31] + "…"


def _number(value: float | None) -> str:
    """Four digits; what is infinite has no number in JSON."""
    return "∞" if value is None else f"{value:.4g}"


def _epsilon(info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    told = [(line["round"], line["epsilon"]) for line in lines if "epsilon" in line]
    if not told or "privacy" not in info:
        return ""

    def draw(axes: Any) -> None:
        axes.step(*zip((0, 0.0), *told, strict=True), "o-", where="post", label="spent")
        if (budget := info["privacy"]["budget"]) is not None:
            axes.axhline(budget, ls=":", color="grey", label="budget")
        axes.set(xlabel="round", ylabel="epsilon", ylim=(0, None))
        _whole_rounds(axes)
        axes.legend(frameon=False)

    return _svg(draw)


def _bytes(lines: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        rounds = [line["round"] for line in lines]
        most = max((max(line["bytes_up"], line["bytes_down"]) for line in lines), default=0)
        scale, unit = next((s, u) for s, u in _UNITS if most >= s or s == 1)
        for shift, key, label in ((-0.2, "bytes_up", "up"), (0.2, "bytes_down", "down")):
            values = [line[key] / scale for line in lines]
            axes.bar([r + shift for r in rounds], values, width=0.4, label=label)
        axes.set(xlabel="round", ylabel=f"{unit}, all clients")
        axes.margins(y=0.25)  # room for the legend
        _whole_rounds(axes)
        axes.legend(frameon=False)

    return _svg(draw)


def _seconds(lines: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        axes.bar([line["round"] for line in lines], [line["seconds"] for line in lines])
        axes.set(xlabel="round", ylabel="seconds")
        _whole_rounds(axes)

    return _svg(draw)


def _whole_rounds(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _svg(draw: Any, height: float = 3.4) -> str:
    """A chart as inline SVG. Uses no global figure, so it is safe in any process."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.hashsalt": "corolla", "svg.fonttype": "none", "font.size": 9}
    with rc_context(settings), warnings.catch_warnings():
        # Text stays text in the SVG: the browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue())
