"""A comparison as files: report.html without links, plots as PNG and SVG, JSON, and a CSV."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corolla.artefacts.sizes import sizes
from corolla.commands.compare import plots
from corolla.commands.compare.plots import Entry
from corolla.commands.compare.results import JUDGED
from corolla.embedded.pages import inline, render_page, shown
from corolla.host.files import write_atomic
from corolla.host.text import human_bytes


def write_comparison(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, results.csv, plots/ and report.html from `results.results`."""
    (folder / "plots").mkdir(exist_ok=True)
    write_atomic(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomic(folder / "results.csv", _csv(results).encode())
    charts = []
    for chart in plots.charts(results):
        svg, png = plots.render(chart.draw, results["methods"])
        write_atomic(folder / "plots" / f"{chart.name}.svg", svg.encode())
        write_atomic(folder / "plots" / f"{chart.name}.png", png)
        charts.append((chart.title, chart.caption, inline(svg)))
    numbered = enumerate(results["methods"])
    page = render_page(
        "comparison.html.j2",
        r=results,
        size=human_bytes,
        interval=interval,
        number=number,
        sizes=sizes,
        charts=charts,
        sentences=sentences(results),
        colour={e["label"]: shown(plots.COLOURS[i % len(plots.COLOURS)]) for i, e in numbered},
        config=results["plan"]["methods"][0]["config"],
    )
    write_atomic(folder / "report.html", page)


def interval(value: Entry | None, digits: int = 4, scale: float = 1.0) -> str:
    """'3.250 ± 0.012': a mean and half its 95 % interval; the mean alone for one seed."""
    if value is None:
        return "–"
    centre = f"{scale * value['mean']:.{digits}f}"
    if value["high"] is None:
        return centre
    return f"{centre} ± {scale * (value['high'] - value['mean']):.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """'1,234.5', or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Returns the sentences that may be said of each method beside the first."""
    said = []
    for key, what in (("held_out", "held-out loss"), ("own", "loss on the clients' own examples")):
        table = results[key]
        if table is None or (key == "own" and not any(e["personal"] for e in results["methods"])):
            continue
        for row in table["rows"]:
            pair = f"{row['label']} and {table['reference']}"
            n = row["difference"]["n"]
            if row["verdict"] in ("lower", "higher"):
                said.append(
                    f"{row['label']} has a {row['verdict']} {what} than {table['reference']}: by "
                    f"{abs(row['difference']['mean']):.4f} (paired over {n} seeds, "
                    f"p = {row['p_holm']:.2g} after Holm's correction)."
                )
            elif row["verdict"] == "not judged":
                seeds = "1 seed" if n == 1 else f"{n} seeds"
                said.append(
                    f"{pair}: {what} not judged on {seeds}; a verdict needs {JUDGED} or more."
                )
            else:
                said.append(
                    f"{pair}: no difference in {what} is shown (paired over {n} seeds, "
                    f"p = {row['p_holm']:.2g} after Holm's correction)."
                )
    return said


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
