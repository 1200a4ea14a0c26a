"""Sparse messages both ways, and Fisher merging, against FedAvg with the same clients.

    python -m experiments.merging.run

Every run is one `corolla simulate` in this process, on the embedded model and data (clients are
modules of the documentation, so that their rows are unlike), at the default learning rate: none was
searched. Seeds are paired: what is told is the mean of the differences from FedAvg, with Student's
interval of 95 % over seeds. Results go to results.json beside this file.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.commands.simulate.in_process import simulate
from corolla.config.load import load
from experiments.bench.zeroth_order import machine

RESULTS = Path(__file__).with_name("results.json")
SEEDS = (0, 1, 2)
STUDENT = 4.303
"""Quantile of Student's t of 95 % on both sides, two degrees of freedom: three seeds."""
COMMON = ("clients=6", "cohort=3", "rounds=3", "eval-clients=2", "eval-client-examples=4")
SPARSE = ('codec=["top_k:0.25"]', 'codec-down=["top_k:0.25"]')
BASELINE = "fedavg"
RUNS: Mapping[str, Sequence[str]] = {
    BASELINE: ("strategy=fedavg",),
    "a quarter both ways": ("strategy=fedavg", *SPARSE),
    "fisher": ("strategy=fisher",),
}
"""Name of a trial → its settings."""


def measured(settings: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """One run: losses, bytes both ways, CPU seconds."""
    before = time.process_time()
    simulate(load(None, {"threads": 1}, [*COMMON, *settings, f"seed={seed}"]), folder)
    info = json.loads((folder / "run.json").read_text())
    return {
        "seed": seed,
        "base": info["base"]["loss"],
        "loss": info["final"]["loss"],
        "up": info["bytes_up"],
        "down": info["bytes_down"],
        "cpu_seconds": time.process_time() - before,
    }


def told(name: str, runs: Sequence[Mapping[str, Any]], usual: Sequence[Mapping[str, Any]]) -> str:
    """A line: the mean loss, its difference from FedAvg's with an interval, the ratio of bytes."""
    loss = statistics.fmean(run["loss"] for run in runs)
    apart = [run["loss"] - other["loss"] for run, other in zip(runs, usual, strict=True)]
    middle = statistics.fmean(apart)
    half = STUDENT * statistics.stdev(apart) / math.sqrt(len(apart))
    ratio = {way: sum(r[way] for r in runs) / sum(r[way] for r in usual) for way in ("up", "down")}
    cpu = statistics.fmean(run["cpu_seconds"] for run in runs)
    return (
        f"{name}: loss {loss:.3f}, {middle:+.3f} ± {half:.3f} from {BASELINE}; bytes up "
        f"{ratio['up']:.3f}, down {ratio['down']:.3f} of its own; {cpu:.0f} CPU seconds a run"
    )


def main() -> None:
    """Run all, seed by seed, and print a line of each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    results = {"machine": machine(), "common": COMMON, "runs": found}
    for seed in SEEDS:
        for name, settings in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measured(settings, seed, Path(folder) / "run"))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, found[name][-1], flush=True)
    for name, runs in found.items():
        print(told(name, runs, found[BASELINE]))


if __name__ == "__main__":
    main()
