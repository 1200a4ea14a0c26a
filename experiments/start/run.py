"""The costs of the commands of the README's "Where to start": bytes, loss, seconds, rank.

    python -m experiments.start.run

Every run is one `corolla simulate` in this process, on the embedded model, with one seed and the
default rates: none was searched, so the losses say what to expect and not which strategy is better.
Results go to results.json beside this file, and the rows of the README's table to the screen.
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.artefacts.sizes import sizes
from corolla.commands.simulate.in_process import simulate
from corolla.config.load import load
from corolla.host.text import human_bytes
from experiments.bench.zeroth_order import machine

RESULTS = Path(__file__).with_name("results.json")
SEEDS = (0,)
COMMON = {"clients": "6", "cohort": "3", "rounds": "3"}
NEEDS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "exact, and a sum is all the server needs": ({"strategy": "fedsvd"}, {"strategy": "rolora"}),
    "exact, and clients go on with their adapters": (
        {"strategy": "fedex_lora"},
        {"strategy": "fedex_lora", "max-rank": "32"},
    ),
    "kilobytes up": ({"strategy": "seed_pool"},),
    "private rows": ({"strategy": "ffa_lora", "dp": "example", "epsilon": "8"},),
}
"""What somebody needs → the settings of the commands that serve it."""
OPTIONS = ("strategy", "dp", "epsilon")
"""Settings that have an option of their own; others are given with --set."""


def command(settings: Mapping[str, str]) -> str:
    """The command of a row, without the settings that all have in common."""
    parts = [f"--{k} {v}" if k in OPTIONS else f"--set {k}={v}" for k, v in settings.items()]
    return f"corolla simulate {' '.join(parts)}"


def measured(settings: Mapping[str, str], seed: int, folder: Path) -> dict[str, Any]:
    """One run: losses, bytes of a client in a round, seconds, ranks."""
    given = [f"{k}={v}" for k, v in {**COMMON, **settings, "seed": str(seed)}.items()]
    load_before = os.getloadavg()[0]
    simulate(load(None, {"threads": 1}, given), folder)
    info = json.loads((folder / "run.json").read_text())
    tasks = int(COMMON["cohort"]) * int(COMMON["rounds"])
    return {
        "seed": seed,
        "base": info["base"]["loss"],
        "loss": info["final"]["loss"],
        "up": info["bytes_up"] / tasks,
        "down": info["bytes_down"] / tasks,
        "seconds": info["seconds"],
        "served": info["served"],
        "rank_errors": info.get("rank_errors", []),
        "load_before": load_before,
    }


def rows(results: Mapping[str, Any]) -> list[str]:
    """The rows of the README's table, from results.json."""
    found = []
    for row in results["rows"]:
        runs = row["runs"]
        mean = {
            key: statistics.fmean(run[key] for run in runs)
            for key in ("up", "down", "loss", "seconds")
        }
        told = (
            f"{human_bytes(mean['up'])}, {human_bytes(mean['down'])}",
            f"{mean['loss']:.3f}",
            f"{mean['seconds']:.0f}",
            sizes(runs[0]["served"])[0],
        )
        found.append(f"| {row['need']} | `{row['command']}` | {' | '.join(told)} |")
    return found


def main() -> None:
    """Run all rows, seed by seed, and print them."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=True
    ).stdout.strip()
    results: dict[str, Any] = {
        "machine": {"commit": commit, **machine()},
        "common": COMMON,
        "rows": [
            {"need": need, "command": command(settings), "settings": settings, "runs": []}
            for need, own in NEEDS.items()
            for settings in own
        ],
    }
    for seed in SEEDS:
        for row in results["rows"]:
            with tempfile.TemporaryDirectory() as scratch:
                row["runs"].append(measured(row["settings"], seed, Path(scratch, "run")))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{row['command']}, seed {seed}: {row['runs'][-1]['loss']:.4f}", flush=True)
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
