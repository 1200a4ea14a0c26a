"""What a comparison says in numbers, read from the run folders of its cells.

Held-out losses of global models and the losses of personal models on their clients' own examples
are different quantities: they never stand in one list.
"""

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.commands.compare import statistics as student
from corolla.errors import ArtefactError
from corolla.models import adapter_files
from corolla.server.runs import journal
from corolla.tensors import factors
from corolla.types import Params

SIGNIFICANT = 0.05
_BY_CHANCE = "drawn by secret chance"
_WORK = ("local_steps", "local_epochs", "batch_size", "queries", "classes")


@dataclass(frozen=True)
class Point:
    """A global model on its way: after `round` rounds, at what price, how good."""

    round: int
    bytes: float
    """Up and down so far, mean over all clients of the federation."""
    seconds: float
    loss: float


@dataclass(frozen=True)
class Cell:
    """One finished run. `loss` is that of its last point; `own_loss` the mean over clients."""

    method: str
    lr: float
    seed: int
    personal: bool
    points: Sequence[Point]
    accuracy: float
    own_loss: float | None
    peak_rss: int
    bytes_up: float
    bytes_down: float
    dropped: int
    simulated: bool
    """Whether seconds are simulated ones."""
    evidence: Mapping[str, Any]
    work: Sequence[Any]
    """How clients train: trainers, steps, batch size. Who works alike reads the same tokens."""
    tokens: Sequence[float | None]
    """Target tokens that the cohort trained on, per round; None with differential privacy."""
    epsilon: float | None = None
    """Spent in all; None without differential privacy."""
    cpu_seconds: float | None = None
    beside: bool = False
    """Whether another cell ran at the same time: its seconds are those of a shared machine."""
    aggregation_errors: Sequence[float] | None = None
    initial_sha256: str | None = None

    @property
    def loss(self) -> float:
        return self.points[-1].loss


def read_cell(folder: Path, method: Mapping[str, Any], costs: Mapping[str, Any]) -> Cell:
    """A run's folder as a cell; `costs` is what was measured outside of it.

    `method` has its label, whether it is personal, and its trainers.

    Raises ArtefactError when it is not that of a finished run.
    """
    try:
        info = json.loads((folder / "run.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return _cell(info, lines, _planned(folder, info["config"]), method, costs)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtefactError(f"{folder} is no finished run: {error!r}") from error


def _cell(
    info: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    plans: Mapping[int, list[str]] | None,
    method: Mapping[str, Any],
    costs: Mapping[str, Any],
) -> Cell:
    config, personal = info["config"], method["personal"]
    clients = info["clients"]
    own = [scores["final"]["loss"] for scores in clients.values() if "loss" in scores["final"]]
    before = [s["base"]["loss"] for s in clients.values() if "loss" in s["base"]]
    clock = "sim_seconds" if all("sim_seconds" in line for line in lines) else "seconds"
    key = "personal_loss" if personal else "eval_loss"
    first = statistics.fmean(before) if personal and before else info["base"]["loss"]
    points, sent, passed = [Point(0, 0.0, 0.0, first)], 0.0, 0.0
    for line in lines:
        sent += (line["bytes_up"] + line["bytes_down"]) / info["num_clients"]
        passed += line[clock]
        if line.get(key) is not None:
            points.append(Point(line["round"], sent, passed, line[key]))
    return Cell(
        method=method["label"],
        lr=config["lr"],
        seed=config["seed"],
        personal=personal,
        points=points,
        accuracy=info["final"]["accuracy"],
        own_loss=statistics.fmean(own) if own else None,
        peak_rss=info["peak_rss"],
        bytes_up=info["bytes_up"] / info["num_clients"],
        bytes_down=info["bytes_down"] / info["num_clients"],
        dropped=sum(line.get("dropped", 0) for line in lines),
        simulated=clock == "sim_seconds",
        evidence=_evidence(info, lines, plans),
        work=[method["trainers"], *(config[k] for k in _WORK)],
        tokens=[line.get("target_tokens") for line in lines],
        epsilon=info.get("privacy", {}).get("epsilon"),
        **costs,
    )


def _evidence(
    info: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    plans: Mapping[int, list[str]] | None,
) -> dict[str, Any]:
    """What must be the same for all methods at one seed."""
    cohorts = _cohorts(lines) if plans is None else [plans.get(line["round"]) for line in lines]
    clients = {
        name: (scores["base"].get("examples"), round(scores["base"].get("loss", 0.0), 4))
        for name, scores in info["clients"].items()
    }
    return {
        "model": info["model_sha256"],
        "data": info["data_sha256"],
        "partition": _digest([info["num_clients"], clients]),
        "base model's loss": round(info["base"]["loss"], 4),
        "cohorts": [_digest(members) if members else None for members in cohorts],
    }


def _cohorts(lines: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    """Who was asked in each round; None where the line does not tell all of them."""
    told = [sorted({*line.get("client_loss", {}), *line.get("dropped_why", {})}) for line in lines]
    asked = [line["clients"] + line.get("dropped", 0) for line in lines]
    return [own if len(own) == n else None for own, n in zip(told, asked, strict=True)]


def _planned(folder: Path, config: Mapping[str, Any]) -> dict[int, list[str]] | None:
    """The cohorts as the journal has them: with differential privacy the lines do not tell.

    Those drawn by secret chance differ, and have to: they all stand for the same draw.
    """
    if config.get("dp", "none") == "none":
        return None
    plans = journal.past(journal.read(folder)).plans
    secret = config["dp_sampling"] == "poisson"
    return {n: [_BY_CHANCE] if secret else sorted(plan["cohort"]) for n, plan in plans.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unequal(cells: Iterable[Cell]) -> list[str]:
    """Where cells of one seed differ in what must be equal; empty when the terms were equal."""
    found = []
    by_seed = sorted(cells, key=lambda cell: cell.seed)
    found += [
        f"the {what} is not the same in all cells: it changed on the way"
        for what in ("model", "data")
        if len({str(cell.evidence.get(what)) for cell in {c.seed: c for c in by_seed}.values()}) > 1
    ]
    for seed, group in itertools.groupby(by_seed, key=lambda cell: cell.seed):
        first, *others = group
        alike: dict[str, Cell] = {}
        for cell in (first, *others):
            pair = f"of {cell.method} and {first.method} differ"
            for what, value in first.evidence.items():
                if cell.evidence[what] != value:
                    found.append(f"seed {seed}: {what} {pair}")
            model = alike.setdefault(json.dumps(cell.work), cell)
            if cell.tokens != model.tokens:
                pair = f"of {cell.method} and {model.method} differ"
                found.append(f"seed {seed}: tokens trained on {pair}, though both work alike")
        if any(c is None for cell in (first, *others) for c in cell.evidence["cohorts"]):
            found.append(f"seed {seed}: the cohort of a round is not known, so it is not proven")
    return list(dict.fromkeys(found))


def aggregation_errors(folder: Path) -> list[float] | None:
    """Per round, how far the new global effective update is from the clients' weighted mean.

    ‖ΔW - Σ p_m ΔW_m‖ / ‖Σ p_m ΔW_m‖ in the Frobenius norm over all adapted modules, all relative to
    the base model, p_m by examples; from the files of --keep-updates, without a dense matrix. None
    without such files.
    """
    rounds = sorted((folder / "updates").glob("round-*"))
    if not rounds:
        return None
    return [_error(path, folder / "global" / path.name) for path in rounds]


def _error(round: Path, after: Path) -> float:
    parts: list[Params] = []
    for note in sorted(round.glob("*/update.json")):
        weight = json.loads(note.read_text()).get("weight")
        if weight is not None:  # None: the reply was not accepted
            update, _ = adapter_files.read_adapter(note.parent)
            parts.append(factors.bake(update, weight))
    return factors.distance(adapter_files.read_adapter(after)[0], factors.stack(parts))


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
    budgets = _budgets([cell for cell in cells if not cell.personal])
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
            str(cell.seed): {**cell.evidence, "cohorts": _digest(cell.evidence["cohorts"])}
            for cell in max(finals.values(), key=len, default=())
        },
    }


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
        "dropped": sum(cell.dropped for cell in cells),
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
    if budgets and not personal:
        for key, price in (("bytes", _bytes), ("seconds", _seconds)):
            met = [interpolate(cell.points, price, budgets[key]) for cell in cells]
            summary[f"at_{key}"] = {
                **_told([loss for loss, _ in met]),
                "within_first_round": any(within for _, within in met),
            }
    return summary


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
    """Paired differences to the first method over seeds, and what may be said of them."""
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
    tested = {label: student.p_value(d) for label, d in pairs.items() if len(d) > 1}
    adjusted = student.holm(tested)
    rows = []
    for label, differences in pairs.items():
        if not differences:
            continue
        apart = student.mean(list(values[label].values())).apart_from(
            student.mean(list(first.values()))
        )
        p = adjusted.get(label)
        shown = apart and p is not None and p < SIGNIFICANT
        sign = "lower" if statistics.fmean(differences) < 0 else "higher"
        rows.append(
            {
                "label": label,
                "difference": _told(differences),
                "p": tested.get(label),
                "p_holm": p,
                "intervals_apart": apart,
                "verdict": sign if shown else None,
            }
        )
    return {"reference": reference, "rows": rows}


def _pareto(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Global methods that no other beats in both bytes and mean held-out loss."""
    told = [(e["bytes"], e["loss"]["mean"], e["label"]) for e in entries if e.get("loss")]
    front, best = [], math.inf
    for _, loss, label in sorted(told):
        if loss < best:
            front.append(label)
            best = loss
    return front


def _told(values: Sequence[float]) -> dict[str, Any]:
    return vars(student.mean(values))


def _bytes(point: Point) -> float:
    return point.bytes


def _seconds(point: Point) -> float:
    return point.seconds
