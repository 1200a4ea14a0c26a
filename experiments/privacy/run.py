"""Strategies at equal epsilon on the embedded task: three seeds, equal searches, pairs.

    python -m experiments.privacy.run
    python -m experiments.privacy.run --quick --out FOLDER
    python -m experiments.privacy.run --level example --strategies fedavg ffa_lora

A cell is one `corolla simulate`, in this process: a level and an epsilon, a strategy, a learning
rate and a clip, a seed. On the first seed each strategy has a grid of settings to try (SEARCH), the
same for all with backpropagation; the one with the lowest loss is run with the other seeds.
Cells are written to results.json as they end, and what is there is not run again. `--quick` shows
in minutes that everything works, and nothing else. README.md says how to read it.
"""

import argparse
import csv
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import t as student

from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
STRATEGIES = ("fedavg", "ffa_lora", "seed_pool")
EPSILONS = {"example": (8.0, 3.0), "client": (8.0,)}
LEVELS = ("example", "client", "none")
_ALWAYS: dict[str, Any] = {
    "partition": "iid",
    "rank": 4,
    "alpha": 8.0,
    "max_length": 48,
    "schedule": "constant",
    "eval_clients": 0,
    "eval_every": 1000,  # the end only
    "eval_examples": 64,
    "threads": 1,
}
SIZES: dict[str, dict[str, Any]] = {
    "example": {"clients": 4, "cohort": 4, "rounds": 3, "local_steps": 2, "batch_size": 32},
    "client": {"clients": 100, "cohort": 100, "rounds": 2, "local_steps": 1, "batch_size": 4},
}
"""dp=none is run at the sizes of both."""
ZEROTH_ORDER_STEPS = {"example": 2, "client": 4}
SEARCH: dict[tuple[str, str], tuple[Sequence[float], Sequence[float]]] = {
    ("example", ""): ((8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128), (0.3,)),
    ("client", ""): ((4e-3, 1.6e-2, 6.4e-2), (0.5, 2.0)),
    ("example", "seed_pool"): ((3e-3, 1.2e-2), (1.0, 4.0)),
    ("client", "seed_pool"): ((3e-3, 1.2e-2), (0.01, 0.05)),
}
"""(sizes, strategy; "": all others) → the rates and clips that are tried, each with each.

AdamW does not see the size of a gradient, so that with dp=example one clip below most norms does.
"""
_QUICK: dict[str, Any] = {"rounds": 1, "local_steps": 1, "batch_size": 4, "eval_examples": 4}


@dataclass(frozen=True)
class Cell:
    """One run. `size` is the level whose sizes it has: that of `level`, but of dp=none either."""

    size: str
    level: str
    epsilon: float | None
    strategy: str
    lr: float
    clip: float | None
    seed: int

    @property
    def group(self) -> tuple[str, str, float | None, str]:
        """What is compared: everything but the settings that are searched, and the seed."""
        return self.size, self.level, self.epsilon, self.strategy

    def config(self, quick: bool) -> RunConfig:
        """Of the run."""
        values = {**_ALWAYS, **SIZES[self.size], "strategy": self.strategy, "lr": self.lr}
        if self.strategy == "seed_pool":
            values["local_steps"] = ZEROTH_ORDER_STEPS[self.size]
        if self.level != "none":
            values |= {"dp": self.level, "epsilon": self.epsilon, "clip": self.clip}
        if quick:
            values |= {**_QUICK, **({"clients": 8, "cohort": 8} if self.size == "client" else {})}
        return RunConfig(**values, seed=self.seed)


def groups(
    levels: Sequence[str], strategies: Sequence[str]
) -> Iterator[tuple[str, str, float | None, str]]:
    """(size, level, epsilon, strategy) of all that is compared, what says most first."""
    for place, level, size in itertools.product(range(2), levels, SIZES):
        wanted: Sequence[float | None] = EPSILONS[size] if level == size else (None,)
        if level in ("none", size) and place < len(wanted):
            for strategy in strategies:
                yield size, level, wanted[place], strategy


def search(size: str, level: str, epsilon: float | None, strategy: str) -> list[Cell]:
    """All settings on the first seed; without privacy there is no clip."""
    rates, clips = SEARCH.get((size, strategy), SEARCH[size, ""])
    tried = itertools.product(rates, (None,) if level == "none" else clips)
    return [Cell(size, level, epsilon, strategy, lr, clip, SEEDS[0]) for lr, clip in tried]


class Results:
    """The cells that have been run, in a file."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.path = folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.cells = json.loads(self.path.read_text())["cells"] if self.path.is_file() else []

    def loss(self, cell: Cell) -> float | None:
        """The held-out loss after the run; None where it has not been run or has diverged."""
        found = self._find(cell)
        return found["loss"] if found else None

    def run(self, cell: Cell) -> float | None:
        """Run a cell that has not been run; its loss."""
        if self._find(cell) is None:
            self._run(cell)
        return self.loss(cell)

    def best(self, group: tuple[str, str, float | None, str]) -> Cell | None:
        """The settings with the lowest loss on the first seed."""
        known = [(loss, c) for c in search(*group) if (loss := self.loss(c)) is not None]
        return min(known, key=lambda pair: pair[0])[1] if known else None

    def losses(self, group: tuple[str, str, float | None, str]) -> list[float]:
        """Of the best settings with each seed, in the order of seeds, as far as they are known."""
        best = self.best(group)
        own = [self.loss(of_seed(best, seed)) for seed in SEEDS] if best else []
        return [loss for loss in own if loss is not None]

    def _find(self, cell: Cell) -> dict[str, Any] | None:
        return next((c for c in self.cells if c["cell"] == asdict(cell)), None)

    def _run(self, cell: Cell) -> None:
        began, cpu, load = time.monotonic(), time.process_time(), os.getloadavg()[0]
        found: dict[str, Any] = {"cell": asdict(cell)}
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "run")
            summary = simulate(cell.config(self.quick), out)
            info = json.loads((out / "run.json").read_text())
        found |= {
            "base": summary.base["loss"],
            "loss": summary.final["loss"] if math.isfinite(summary.final["loss"]) else None,
            "accuracy": summary.final["accuracy"],
            "privacy": info.get("privacy"),
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "load": load,
        }
        self.cells.append(found)
        facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "quick": self.quick,
            "always": _ALWAYS,
            "sizes": SIZES,
            "zeroth_order_steps": ZEROTH_ORDER_STEPS,
            "cells": self.cells,
        }
        scratch_file = self.path.with_suffix(".part")
        scratch_file.write_text(json.dumps(facts, indent=1) + "\n")
        scratch_file.replace(self.path)
        print(f"{cell}: {found['base']:.4f} -> {summary.final['loss']:.4f}, "
              f"{found['seconds']:.0f} s", flush=True)  # fmt: skip


def of_seed(cell: Cell, seed: int) -> Cell:
    """The same settings with another seed."""
    return Cell(**{**asdict(cell), "seed": seed})


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of Student's t; infinite for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    width = float(student.ppf(0.975, len(values) - 1))
    return mean, width * statistics.stdev(values) / math.sqrt(len(values))


def rows(
    results: Results, levels: Sequence[str], strategies: Sequence[str]
) -> list[dict[str, Any]]:
    """A line for each group that has results, with its paired difference to the first strategy."""
    found = []
    for group in groups(levels, strategies):
        losses, first = results.losses(group), results.losses((*group[:3], strategies[0]))
        best = results.best(group)
        if not losses or best is None:
            continue
        mean, half = interval(losses)
        row = {
            **dict(zip(("size", "level", "epsilon", "strategy"), group, strict=True)),
            "lr": best.lr,
            "clip": best.clip,
            "seeds": len(losses),
            "loss": mean,
            "half_interval": half,
        }
        if group[3] != strategies[0] and len(losses) == len(first):
            pairs = [own - other for own, other in zip(losses, first, strict=True)]
            row["difference"], row["half_difference"] = interval(pairs)
        found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| sizes of | dp | epsilon | strategy | lr | clip | seeds | held-out loss | to the first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        shown = f"{row['loss']:.3f}{_half(row['half_interval'])}"
        apart = (
            f"{row['difference']:+.3f}{_half(row['half_difference'])}"
            if "difference" in row
            else ""
        )
        lines.append(
            f"| {row['size']} | {row['level']} | {row['epsilon'] or '∞'} | `{row['strategy']}` "
            f"| {row['lr']:g} | {row['clip'] or ''} | {row['seeds']} | {shown} | {apart} |"
        )
    return "\n".join(lines)


def _half(width: float) -> str:
    return f" ± {width:.3f}" if math.isfinite(width) else ""


def plot(results: Results, found: Sequence[dict[str, Any]]) -> None:
    """A panel for each size: all seeds as points, the mean as a bar, the base model as a line."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in found)]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        own = [row for row in found if row["size"] == size]
        named = list(dict.fromkeys((row["level"], row["epsilon"]) for row in own))
        strategies = list(dict.fromkeys(row["strategy"] for row in own))
        width = 0.8 / len(strategies)
        for column, strategy in enumerate(strategies):
            for place, (level, epsilon) in enumerate(named):
                losses = results.losses((size, level, epsilon, strategy))
                if losses:
                    x = place + (column - (len(strategies) - 1) / 2) * width
                    label = strategy if place == 0 else None
                    mean = statistics.fmean(losses)
                    axis.plot([x] * len(losses), losses, "o", color=f"C{column}", ms=4, alpha=0.6)
                    axis.plot([x - width / 3, x + width / 3], [mean, mean], color=f"C{column}",
                              lw=2.5, label=label)  # fmt: skip
        bases = [cell["base"] for cell in results.cells if cell["cell"]["size"] == size]
        axis.axhline(statistics.fmean(bases), color="grey", ls="--", lw=1, label="base model")
        axis.set_xticks(range(len(named)))
        axis.set_xticklabels(["no dp" if e is None else f"{lv}, ε = {e:g}" for lv, e in named])
        axis.set_title(f"{SIZES[size]['clients']} clients, {SIZES[size]['rounds']} rounds")
        axis.set_ylabel("held-out loss")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(results.folder / "losses.png", dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--level", choices=LEVELS, nargs="+", default=LEVELS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="the first is compared")
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new cell after these")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    if options.quick and options.out == HERE:
        parser.error("--quick needs --out: its numbers are none")
    results = Results(options.out, options.quick)
    chosen = list(groups(options.level, options.strategies))
    until = time.monotonic() + 60 * options.minutes
    if not options.table:
        for group in chosen:
            for cell in search(*group):
                if time.monotonic() < until:
                    results.run(cell)
            for seed in SEEDS[1:]:
                if (best := results.best(group)) and time.monotonic() < until:
                    results.run(of_seed(best, seed))
    found = rows(results, LEVELS, options.strategies)
    print(table(found))
    if found:
        with (options.out / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)))
            writer.writeheader()
            writer.writerows(found)
        plot(results, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
