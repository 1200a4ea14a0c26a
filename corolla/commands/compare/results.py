"""The numbers of a comparison: means, intervals, tests, prices, and whether terms were equal.

Held-out losses of global models and the losses of personal models on their clients' own examples
are different quantities: they never stand in one list.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from corolla.commands.compare.cells import Cell, Point, digest
from corolla.commands.compare.statistics import holm, mean, p_value

SIGNIFICANT = 0.05
"""Largest p value, after Holm's correction, of a difference that is shown."""
JUDGED = 3
"""Number of seeds from which on a difference is judged: two have an interval of 12.7 errors."""


def unequal(cells: Iterable[Cell]) -> list[str]:
    """Where cells of one seed differ in what must be equal; empty when the terms were equal."""
    found = []
    by_seed = sorted(cells, key=lambda cell: cell.seed)
    told = ("model", "data", "base model's loss")
    found += [
        f"the {what} is not the same in all cells: it changed on the way"
        for what in ("model", "data")
        if len({str(cell.evidence.get(what)) for cell in {c.seed: c for c in by_seed}.values()}) > 1
    ]
    for seed, group in itertools.groupby(by_seed, key=lambda cell: cell.seed):
        first, *others = sorted(group, key=lambda cell: cell.pooled)
        alike: dict[str, Cell] = {}
        for cell in (first, *others):
            pair = f"of {cell.method} and {first.method} differ"
            for what, value in first.evidence.items():
                if cell.evidence[what] != value and (what in told or not cell.pooled):
                    found.append(f"seed {seed}: {what} {pair}")
            if cell.pooled:
                continue
            model = alike.setdefault(json.dumps(cell.work), cell)
            if cell.tokens != model.tokens:
                pair = f"of {cell.method} and {model.method} differ"
                found.append(f"seed {seed}: tokens trained on {pair}, though both work alike")
        if any(c is None for cell in (first, *others) for c in cell.evidence["cohorts"]):
            found.append(f"seed {seed}: the cohort of a round is not known, so it is not proven")
    return list(dict.fromkeys(found))


def interpolate(
    points: Sequence[Point], price: Callable[[Point], float], at: float
) -> tuple[float, bool]:
    """(the loss where the price is `at`, on straight lines; whether that is within round 1)."""
    for before, after in itertools.pairwise(points):
        if price(after) >= at:
            width = price(after) - price(before)
            part = (at - price(before)) / width if width else 1.0
            return before.loss + part * (after.loss - before.loss), before.round == 0 and part < 1
    return points[-1].loss, False


def best_lr(losses: Mapping[float, float | None]) -> float | None:
    """The learning rate with the smallest finite loss; of equal ones the smaller. None: none is."""
    finite = {lr: x for lr, x in losses.items() if x is not None and math.isfinite(x)}
    return min(finite, key=lambda lr: (finite[lr], lr), default=None)


def edge(losses: Mapping[float, float | None]) -> str | None:
    """'lowest' or 'highest' when the best learning rate is at that end of several, else None."""
    best = best_lr(losses)
    if best is None or len(losses) < 2:
        return None
    return {min(losses): "lowest", max(losses): "highest"}.get(best)


def results(
    methods: Sequence[Mapping[str, Any]],
    searches: Mapping[str, Mapping[float, float | None]],
    finals: Mapping[str, Sequence[Cell]],
) -> dict[str, Any]:
    """Everything the report shows, ready for JSON. `methods` describes them, in order.

    `finals` holds each method's cells, one a seed, at its learning rate.
    """
    cells = [cell for group in finals.values() for cell in group]
    budgets = _budgets([cell for cell in cells if not cell.personal and not cell.pooled])
    entries = []
    for method in methods:
        label = method["label"]
        losses = searches[label]
        entry = {
            **method,
            "lr": best_lr(losses),
            "edge": edge(losses),
            "search": [{"lr": lr, "own_loss": loss} for lr, loss in losses.items()],
        }
        if own := finals[label]:
            entry |= _summary(own, budgets)
        entries.append(entry)
    return {
        "budgets": budgets,
        "simulated_seconds": bool(cells) and all(cell.simulated for cell in cells),
        "methods": entries,
        "held_out": _against_first(finals, lambda c: None if c.personal else c.loss),
        "own": _against_first(finals, lambda c: c.own_loss),
        "pareto": _pareto(entries),
        "unequal": unequal(cells),
        "initial": _initial(cells),
        "evidence": {
            str(cell.seed): {**cell.evidence, "cohorts": digest(cell.evidence["cohorts"])}
            for cell in max(_federated(finals), key=len, default=())
        },
    }


def _federated(finals: Mapping[str, Sequence[Cell]]) -> list[Sequence[Cell]]:
    """The cells of each method, but for those in which one client has the rows of all."""
    groups = [group for group in finals.values() if group]
    return [group for group in groups if not group[0].pooled] or groups


def _initial(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """sha256 of an initial adapter → the methods that start from it."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.initial_sha256:
            found.setdefault(cell.initial_sha256, []).append(cell.method)
    return found


def _budgets(cells: Sequence[Cell]) -> dict[str, float] | None:
    """The largest prices that every method has paid: bytes per client, seconds."""
    if not cells:
        return None
    return {
        "bytes": min(cell.points[-1].bytes for cell in cells),
        "seconds": min(cell.points[-1].seconds for cell in cells),
    }


def _summary(cells: Sequence[Cell], budgets: Mapping[str, float] | None) -> dict[str, Any]:
    personal = cells[0].personal
    owns = [cell.own_loss for cell in cells if cell.own_loss is not None]
    cpu = [cell.cpu_seconds for cell in cells if cell.cpu_seconds is not None]
    spent = [cell.epsilon for cell in cells if cell.epsilon is not None]
    errors = next((c.aggregation_errors for c in cells if c.aggregation_errors), None)
    summary: dict[str, Any] = {
        "loss": None if personal else _told([cell.loss for cell in cells]),
        "accuracy": None if personal else _told([cell.accuracy for cell in cells]),
        "own_loss": _told(owns) if owns else None,
        "bytes": statistics.fmean(cell.points[-1].bytes for cell in cells),
        "bytes_up": statistics.fmean(cell.bytes_up for cell in cells),
        "bytes_down": statistics.fmean(cell.bytes_down for cell in cells),
        "seconds": statistics.fmean(cell.points[-1].seconds for cell in cells),
        "cpu_seconds": statistics.fmean(cpu) if cpu else None,
        "beside": any(cell.beside for cell in cells),
        "peak_rss": max(cell.peak_rss for cell in cells),
        "served": max((c.served for c in cells if c.served), key=_error_served, default=None),
        "dropped": sum(cell.dropped for cell in cells),
        "warnings": _warnings(cells),
        "epsilon": max(spent) if spent else None,
        "aggregation_errors": errors,
        "at_bytes": None,
        "at_seconds": None,
        "curve": _curve(cells),
        "runs": [
            {"seed": c.seed, "points": [vars(p) for p in c.points], "own_loss": c.own_loss}
            for c in cells
        ],
    }
    if budgets and not personal and not cells[0].pooled:
        for key, price in (("bytes", _bytes), ("seconds", _seconds)):
            met = [interpolate(cell.points, price, budgets[key]) for cell in cells]
            summary[f"at_{key}"] = {
                **_told([loss for loss, _ in met]),
                "within_first_round": any(within for _, within in met),
            }
    return summary


def _warnings(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Returns one method's warnings; a text is there once, with the first seed that has it."""
    found = [{**warning, "seed": cell.seed} for cell in cells for warning in cell.warnings]
    return list({warning["text"]: warning for warning in reversed(found)}.values())[::-1]


def _curve(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """Per round that all seeds measured: means over seeds, and the range of the loss."""
    rows = []
    for group in zip(*(cell.points for cell in cells), strict=False):
        losses = [point.loss for point in group]
        rows.append(
            {
                "round": group[0].round,
                "bytes": statistics.fmean(point.bytes for point in group),
                "seconds": statistics.fmean(point.seconds for point in group),
                "loss": statistics.fmean(losses),
                "low": min(losses),
                "high": max(losses),
            }
        )
    return rows


def _against_first(
    finals: Mapping[str, Sequence[Cell]], value: Callable[[Cell], float | None]
) -> dict[str, Any] | None:
    """Paired differences to the first method over seeds, and what may be said of them.

    A verdict is that of the paired t test at 95 %, with Holm's correction for the pairs of this
    table: "lower", "higher" or "no difference"; "not judged" of fewer seeds than JUDGED.
    """
    values: dict[str, dict[int, float]] = {}
    for label, cells in finals.items():
        known = {cell.seed: v for cell in cells if (v := value(cell)) is not None}
        if known:
            values[label] = known
    if not values:
        return None
    reference, *others = values
    first = values[reference]
    pairs = {
        label: [values[label][seed] - first[seed] for seed in sorted(first.keys() & values[label])]
        for label in others
    }
    tested = {label: p_value(d) for label, d in pairs.items() if len(d) >= JUDGED}
    adjusted = holm(tested)
    rows = []
    for label, differences in pairs.items():
        if not differences:
            continue
        p = adjusted.get(label)
        rows.append(
            {
                "label": label,
                "difference": _told(differences),
                "p": tested.get(label),
                "p_holm": p,
                "verdict": _verdict(statistics.fmean(differences), p),
            }
        )
    return {"reference": reference, "rows": rows}


def _verdict(difference: float, p: float | None) -> str:
    if p is None:
        return "not judged"
    if p >= SIGNIFICANT:
        return "no difference"
    return "lower" if difference < 0 else "higher"


def _pareto(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Global methods that no other beats in both bytes and mean held-out loss; no baselines."""
    shown = [e for e in entries if e.get("loss") and not e["baseline"]]
    told = [(e["bytes"], e["loss"]["mean"], e["label"]) for e in shown]
    front, best = [], math.inf
    for _, loss, label in sorted(told):
        if loss < best:
            front.append(label)
            best = loss
    return front


def _told(values: Sequence[float]) -> dict[str, Any]:
    return vars(mean(values))


def _error_served(served: Mapping[str, Any]) -> float:
    """Returns the relative error of served/: of several seeds the worst one is shown."""
    return float(served["error"])


def _bytes(point: Point) -> float:
    return point.bytes


def _seconds(point: Point) -> float:
    return point.seconds
