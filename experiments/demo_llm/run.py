"""The lessons of the demo with a language model: base beside tuned, several seeds.

    python -m experiments.demo_llm.run
    python -m experiments.demo_llm.run --table

Each seed is the run of smollm2.toml with that seed: it deals rows to clients, holds rows out and
draws factors. Beside the run's own held-out loss, models write entries for held-out signatures, and
the first four lines are compared: module, name, kind and parameters, which can be read off a
signature. The base model is asked without examples, and with two entries of the training data
before the question; the tuned one without. Cells go to results.json as they end, and what is there
is not run again; `--table` prints Markdown. `--runs FOLDER` keeps the runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from corolla.commands import artefacts
from corolla.commands.simulate.in_process import simulate
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.data import federated, templates
from corolla.data.rows import Example
from corolla.evaluation.answers import generate
from corolla.models import devices, pretrained
from experiments.bench.zeroth_order import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
SEEDS = (0, 1, 2)
FIELDS = ("Module", "Name", "Kind", "Parameters")
ASKED = 32
"""The number of held-out signatures that entries are written for."""
TOKENS = 64
"""The number of tokens that an entry may have: its first four lines have about 30."""
SHOWN = 2
MODELS = {
    "base": "base model",
    "shown": f"base model, {SHOWN} entries shown",
    "tuned": "tuned",
}

Json = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--runs", type=Path, help="a folder to keep the runs in")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as of corolla")
    given = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"seeds": {}}
    for seed in () if given.table else SEEDS:
        if str(seed) not in results["seeds"]:
            settings = [*given.set, f"seed={seed}", f"threads={given.threads}"]
            config = load(HERE / "smollm2.toml", {}, settings)
            results["machine"] = about()
            results["seeds"][str(seed)] = cell(config, given.runs)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


def about() -> Json:
    """The machine, the versions and the commit of what is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    versions = {"transformers": transformers.__version__, "commit": found.stdout.strip()}
    return {**machine(), **versions}


def cell(config: RunConfig, runs: Path | None) -> Json:
    """One seed: what it was run with, its losses, and how entries are written."""
    devices.set_threads(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (runs or Path(scratch)) / f"seed-{config.seed}"
        clock, cpu = time.monotonic(), time.process_time()
        done = simulate(config, folder)
        took = {"seconds": time.monotonic() - clock, "cpu_seconds": time.process_time() - cpu}
        base = pretrained.load(config)
        data = federated.load(config)
        asked = federated.spread(data.heldout, ASKED)
        shown = [split.train[0] for split in data.clients.values()][:SHOWN]
        found = {
            "base": right(written(base.model, base, asked, []), asked),
            "shown": right(written(base.model, base, asked, shown), asked),
        }
        tuned = artefacts.tuned_of(done.artefact, base)
        found["tuned"] = right(written(tuned, base, asked, []), asked)
    keys = ("rounds", "cohort", "local_steps", "batch_size", "lr", "rank", "threads", "model")
    return {
        "settings": {key: getattr(config, key) for key in keys},
        "clients": len(data.clients),
        "rows": sum(len(split.train) for split in data.clients.values()),
        "loss": {"base": done.base, "tuned": done.final},
        "entries": found,
        "peak_rss": done.peak_rss,
        **took,
    }


def written(
    model: Any, base: pretrained.Base, asked: Sequence[Example], shown: Sequence[Example]
) -> list[str]:
    """The entries that a model writes, greedily, with some shown as earlier turns."""
    form = templates.renderer(base.tokenizer)
    before = [turn for example in shown for turn in example.dialogue]
    prompts = [form.prompt([*before, *example.dialogue], "") for example in asked]
    return generate(model, base, prompts, TOKENS)


def right(entries: Sequence[str], asked: Sequence[Example]) -> dict[str, float]:
    """The shares of entries with each line as in the data, and with all four of them."""
    pairs = [
        (lines(entry), lines(example.text)) for entry, example in zip(entries, asked, strict=True)
    ]
    found = {
        name: statistics.fmean(own.get(name) == theirs[name] for own, theirs in pairs)
        for name in FIELDS
    }
    return {**found, "all": statistics.fmean(own == theirs for own, theirs in pairs)}


def lines(entry: str) -> dict[str, str]:
    """The first four lines of an entry by their field."""
    parts = [line.partition(": ") for line in entry.splitlines()[: len(FIELDS)]]
    return {name: value.strip() for name, mark, value in parts if mark and name in FIELDS}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: means over seeds, and from the least to the largest."""
    cells = list(results["seeds"].values())
    about = f"seeds {', '.join(results['seeds'])}: mean (least to largest)"
    rows = [f"| {about} | {' | '.join(MODELS.values())} |", "|---|---|---|---|"]
    for title, key, shape in (
        ("held-out loss per token", "loss", "{:.3f}"),
        ("held-out accuracy per token", "accuracy", "{:.1%}"),
    ):
        base, tuned = (spread([c["loss"][n][key] for c in cells], shape) for n in ("base", "tuned"))
        rows.append(f"| {title} | {base} | | {tuned} |")
    for name in ("all", *FIELDS):
        title = f"{name} right" if name != "all" else "entries with all four lines right"
        told = (spread([c["entries"][m][name] for c in cells], "{:.0%}") for m in MODELS)
        rows.append(f"| {title} | {' | '.join(told)} |")
    return "\n".join(rows)


def spread(values: Sequence[float], shape: str) -> str:
    """The mean, and from the least to the largest."""
    least, most = shape.format(min(values)), shape.format(max(values))
    return f"{shape.format(statistics.fmean(values))} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
