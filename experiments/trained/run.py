"""Layers, starts, sparse sets and DoRA are compared with LoRA on all layers, in pairs.

    python -m experiments.trained.run
    python -m experiments.trained.run --model smollm2-135m-instruct
    python -m experiments.trained.run --table

A line of results.jsonl is one `corolla simulate`, in this process: a trial, a learning rate, a
seed. Each trial has the same rates to try, on a seed of their own (SEARCH); the one with the lowest
held-out loss is run with the seeds that are reported. Lines are written as runs end, and what is
there is not run again. Public rows are those of modules of the documentation that no client has.
README.md says how to read it.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from corolla.commands.compare.statistics import Mean, mean
from corolla.commands.plan.plan import CostEstimate, plan
from corolla.commands.simulate.in_process import simulate
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.host.text import human_bytes
from experiments.bench.zeroth_order import machine

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SEARCH = 100
"""The seed on which rates are tried: none of those that are reported."""
PUBLIC_EVERY = 4
"""Every so many modules of the documentation, in the order of names, belong to no client."""
BASELINE = "LoRA"


@dataclass(frozen=True)
class Trial:
    """One thing to train, with its settings."""

    name: str
    settings: Sequence[str] = ()
    public: bool = False
    """True where public rows are read."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run on one model, and the rates to try as factors of the default one."""

    settings: Sequence[str]
    trials: Sequence[Trial]
    factors: Sequence[float]
    seeds: Sequence[int] = SEEDS


_QUARTER = Trial("last quarter", ("layers=last:1",))
_TRIALS = (
    Trial(BASELINE),
    _QUARTER,
    Trial("last quarter, same bytes", ("layers=last:1", "rank=32", "alpha=64")),
    Trial("budget of half the backward pass", ("budget=flops:0.5",), public=True),
    Trial("start=pissa", ("start=pissa",)),
    Trial("start=lora_ga", ("start=lora_ga", "rslora=true"), public=True),
    Trial("DoRA, fewer bytes", ("dora=true", "rank=7", "alpha=14")),
    Trial("sparse, random", ("parameters=sparse",)),
    Trial("sparse, gradient", ("parameters=sparse", "select=gradient"), public=True),
    Trial("start=eva", ("start=eva",), public=True),
    Trial("start=olora", ("start=olora",)),
    Trial("sparse, principal", ("parameters=sparse", "select=principal", "spectrum=32")),
    Trial("DoRA, same rank", ("dora=true",)),
    Trial("start=corda_ipm", ("start=corda_ipm",), public=True),
    Trial("start=orthogonal", ("start=orthogonal",)),
    Trial("sparse, magnitude", ("parameters=sparse", "select=magnitude")),
    Trial("sparse, fisher", ("parameters=sparse", "select=fisher"), public=True),
)
MODELS: Mapping[str, Sizes] = {
    "embedded": Sizes(
        (
            *("clients=6", "cohort=3", "rounds=3", "local-steps=5", "batch-size=8"),
            *("max-length=96", "eval-clients=0", "eval-every=1000", "eval-examples=64"),
        ),
        _TRIALS,
        (0.5, 2.0),
    ),
    "smollm2-135m-instruct": Sizes(
        (
            *("clients=4", "cohort=2", "rounds=2", "local-steps=3", "batch-size=4"),
            *("max-length=96", "eval-clients=0", "eval-every=1000", "eval-examples=24"),
        ),
        (
            Trial(BASELINE),
            Trial("last quarter", ("layers=last:7",)),
            Trial("start=pissa", ("start=pissa",)),
            Trial("sparse, random", ("parameters=sparse",)),
        ),
        (),
        (0,),
    ),
}
"""Name of a model → the sizes of its runs."""


class Results:
    """The runs that have ended, a line each, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, model: str, name: str, factor: float, seed: int) -> dict[str, Any] | None:
        """The run of a trial at a rate and a seed; None where it has not ended."""
        wanted = (model, name, factor, seed)
        kept = ("model", "trial", "factor", "seed")
        return next((run for run in self.runs if tuple(run[k] for k in kept) == wanted), None)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append(run)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")

    def best(self, model: str, name: str) -> float | None:
        """The factor with the lowest loss of a trial's search; None before it has ended."""
        factors = MODELS[model].factors
        if not factors:
            return 1.0
        tried = [self.find(model, name, factor, SEARCH) for factor in factors]
        if any(run is None for run in tried):
            return None
        known = [run for run in tried if run is not None and run["loss"] is not None]
        return min(known, key=lambda run: run["loss"])["factor"] if known else None

    def reported(self, model: str, name: str) -> list[dict[str, Any]]:
        """The runs of a trial at its best rate, in the order of seeds, as far as they ended."""
        factor = self.best(model, name)
        if factor is None:
            return []
        found = [self.find(model, name, factor, seed) for seed in MODELS[model].seeds]
        return [run for run in found if run is not None and run["loss"] is not None]


def split(folder: Path) -> tuple[Path, Path]:
    """Write the rows of clients and public ones: two files, of modules of their own."""
    rows = [json.loads(line) for line in asset("data.jsonl").read_text("utf-8").splitlines()]
    kept = set(sorted({row["client_id"] for row in rows})[::PUBLIC_EVERY])
    private = [row for row in rows if row["client_id"] not in kept]
    public = [
        {key: value for key, value in row.items() if key != "client_id"}
        for row in rows
        if row["client_id"] in kept
    ]
    for name, own in (("data", private), ("public", public)):
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "data.jsonl", folder / "public.jsonl"


def configured(model: str, trial: Trial, seed: int, factor: float, folder: Path) -> RunConfig:
    """The settings of a run."""
    data, public = split(folder)
    given = [*MODELS[model].settings, *trial.settings, f"seed={seed}"]
    given += [f"public={public}"] if trial.public else []
    usual = load(None, {"threads": 1, "model": model, "data": str(data)}, given)
    return usual.model_copy(update={"lr": factor * usual.lr})


def measured(model: str, trial: Trial, seed: int, factor: float) -> dict[str, Any]:
    """One run: losses, bytes of a client in a round and once, values, memory, seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        config = configured(model, trial, seed, factor, Path(scratch))
        if (model, trial.name) not in PRICES:
            PRICES[model, trial.name] = plan(config)
        price = PRICES[model, trial.name]
        cpu, load_before = time.process_time(), os.getloadavg()[0]
        out = Path(scratch, "run")
        summary = simulate(config, out)
        spent = time.process_time() - cpu
        info = json.loads((out / "run.json").read_text())
    terms = price.memory.client.terms
    loss = summary.final["loss"]
    return {
        "model": model,
        "trial": trial.name,
        "factor": factor,
        "seed": seed,
        "lr": config.lr,
        "base": summary.base["loss"],
        "loss": loss if math.isfinite(loss) else None,
        "trained": price.trained,
        "up": price.traffic.up[1],
        "once": price.traffic.once,
        "bytes_up": info["bytes_up"],
        "bytes_down": info["bytes_down"],
        "memory": sum(size for name, size in dict(terms).items() if name != "libraries"),
        "cpu_seconds": round(spent, 1),
        "seconds": info["seconds"],
        "load_before": round(load_before, 1),
        "machine": told_machine(),
    }


PRICES: dict[tuple[str, str], CostEstimate] = {}
"""(model, trial) → its costs by formula, which are those of all its runs."""


@cache
def told_machine() -> str:
    """The machine in a line."""
    own = machine()
    return f"{own['date']}, {own['cpu']}, {own['cores']} cores, torch {own['torch']}"


def run_all(results: Results, model: str, until: float, chosen: Sequence[str]) -> None:
    """Run what is missing of a model, trial by trial: its search, then its seeds."""
    sizes = MODELS[model]
    for trial in sizes.trials:
        if chosen and trial.name not in chosen:
            continue
        for factor in sizes.factors:
            _run(results, model, trial, SEARCH, factor, until)
        if (best := results.best(model, trial.name)) is not None:
            for seed in sizes.seeds:
                _run(results, model, trial, seed, best, until)


def _run(
    results: Results, model: str, trial: Trial, seed: int, factor: float, until: float
) -> None:
    if results.find(model, trial.name, factor, seed) is None and time.monotonic() < until:
        found = measured(model, trial, seed, factor)
        results.add(found)
        shown = ("trial", "factor", "seed", "base", "loss", "cpu_seconds", "load_before")
        print({key: found[key] for key in shown}, flush=True)


def paired(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], key: str = "loss"
) -> Mean | None:
    """The mean difference of two trials over the seeds that both have; None without any."""
    by_seed = {run["seed"]: run[key] for run in other}
    apart = [run[key] - by_seed[run["seed"]] for run in own if run["seed"] in by_seed]
    return mean(apart) if apart else None


def table(results: Results, model: str) -> str:
    """Markdown: a row for each trial that has a reported run."""
    lines = [
        "| trained | values | bytes up a round | once | memory | rate | held-out loss | from LoRA "
        "| CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    usual = results.reported(model, BASELINE)
    found = [(trial, results.reported(model, trial.name)) for trial in MODELS[model].trials]
    return "\n".join(lines + [_row(trial, runs, usual) for trial, runs in found if runs])


def _row(trial: Trial, runs: Sequence[dict[str, Any]], usual: Sequence[dict[str, Any]]) -> str:
    loss, last = mean([run["loss"] for run in runs]), runs[-1]
    apart = paired(runs, usual) if trial.name != BASELINE else None
    cells = (
        trial.name,
        f"{last['trained']:,}",
        human_bytes(last["up"]),
        human_bytes(last["once"]) if last["once"] else "",
        human_bytes(last["memory"]),
        f"{last['lr']:.1e}",
        _told(loss, "{:.3f}") + (f" ({len(runs)} seeds)" if len(runs) < len(SEEDS) else ""),
        _told(apart, "{:+.3f}") if apart else "",
        f"{mean([run['cpu_seconds'] for run in runs]).mean:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _told(found: Mean, form: str) -> str:
    half = f" ± {found.high - found.mean:.3f}" if found.high is not None else ""
    return form.format(found.mean) + half


def plot(results: Results, model: str, path: Path) -> None:
    """Differences of held-out loss from LoRA on all layers: seeds as points, means as bars."""
    usual = results.reported(model, BASELINE)
    others = [t.name for t in MODELS[model].trials if t.name != BASELINE]
    shown = {name: runs for name in others if (runs := results.reported(model, name))}
    if not usual or not shown:
        return
    by_seed = {run["seed"]: run["loss"] for run in usual}
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(shown) + 1.2))
    for place, runs in enumerate(shown.values()):
        apart = [run["loss"] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
        if apart:
            axis.plot(apart, [place] * len(apart), "o", color="C0", ms=4, alpha=0.6)
            axis.plot([mean(apart).mean], [place], "|", color="C1", ms=16, mew=2.5)
    axis.axvline(0, color="grey", ls="--", lw=1)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss, difference from LoRA on all layers with the same seed")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--trials", nargs="*", default=(), help="only these")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new run after these")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl")
    if not options.table:
        until = time.monotonic() + 60 * options.minutes
        run_all(results, options.model, until, options.trials)
    print(table(results, options.model))
    plot(results, options.model, options.out / f"differences-{options.model}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
