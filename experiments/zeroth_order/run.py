"""Zeroth-order strategies beside FedAvg on LoRA (FedIT): quality, bytes, memory, time; 3 seeds.

    python experiments/zeroth_order/run.py embedded
    python experiments/zeroth_order/run.py sms --file PATH/TO/sms.jsonl
    python experiments/zeroth_order/run.py clinc150 --file PATH/TO/clinc150.jsonl

Every run is one `corolla simulate` in a process of its own, so that its peak memory is its own.
Results go to results-NAME.json beside this file, run by run: an interrupted experiment goes on
where it was. `--table` only prints the table and draws the plot.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
CONSTANT = "--set schedule=constant"
EMBEDDED = f"--clients 32 --cohort 4 --rounds 5 --set eval-clients=0 {CONSTANT}"
GEMMA = (
    "--model gemma-3-270m --clients 8 --cohort 2 --rounds 2 --batch-size 4 "
    f"--set eval-clients=0 --set eval-examples=24 --set max-length=32 {CONSTANT}"
)
CLINC = GEMMA.replace("--clients 8", "--clients 10")
ZO_STEPS = "--local-steps 60"
METHODS: dict[str, dict[str, str]] = {
    "embedded": {
        "fedavg (FedIT)": f"--strategy fedavg --local-steps 10 {EMBEDDED}",
        "seed_pool, LoRA": f"--strategy seed_pool {ZO_STEPS} {EMBEDDED}",
        "seed_pool, all parameters": f"--strategy seed_pool {ZO_STEPS} {EMBEDDED} "
        "--set parameters=full",
        "fedkseed, LoRA": f"--strategy fedkseed {ZO_STEPS} {EMBEDDED}",
    },
    "sms": {
        "fedavg (FedIT)": f"--strategy fedavg --local-steps 3 {GEMMA}",
        "seed_pool, LoRA": f"--strategy seed_pool --local-steps 10 {GEMMA}",
        "seed_pool, all parameters": f"--strategy seed_pool --local-steps 10 {GEMMA} "
        "--set parameters=full",
    },
    "clinc150": {
        "fedavg (FedIT)": f"--strategy fedavg --local-steps 3 {CLINC}",
        "seed_pool, LoRA": f"--strategy seed_pool --local-steps 10 {CLINC}",
        "seed_pool, all parameters": f"--strategy seed_pool --local-steps 10 {CLINC} "
        "--set parameters=full",
    },
}


def main() -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(METHODS))
    parser.add_argument("--file", type=Path, help="the data, which is not part of the repository")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = _load(HERE / f"results-{options.name}.json")
    if not options.table:
        if options.name != "embedded" and not (options.file and options.file.is_file()):
            print(f"{options.name} needs --file: JSON lines (see README.md for their source)")
            return 2
        _run(options.name, options.file, options.seeds, options.threads, results)
    print(_table(options.name, results))
    _plot(options.name, results)
    return 0


def _run(
    name: str,
    file: Path | None,
    seeds: Sequence[int],
    threads: int,
    results: list[dict[str, Any]],
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        data = [] if file is None else ["--data", str(_prepared(name, file, Path(scratch)))]
        for seed in seeds:
            for method, arguments in METHODS[name].items():
                if any((r["method"], r["seed"]) == (method, seed) for r in results):
                    continue
                out = Path(scratch, f"run-{len(results)}")
                load = os.getloadavg()[0]
                command = [sys.executable, "-m", "corolla", "simulate", *arguments.split(), *data]
                command += ["--seed", str(seed), "--set", f"threads={threads}", "--out", str(out)]
                began = time.monotonic()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                info = json.loads((out / "run.json").read_text())
                lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
                results.append(_result(method, seed, arguments, info, lines) | {"load": load})
                (HERE / f"results-{name}.json").write_text(json.dumps(results, indent=1) + "\n")
                loss = results[-1]["loss"]
                print(f"{method}, seed {seed}: {loss[0]:.4f} -> {loss[-1]:.4f}, "
                      f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip


def _prepared(name: str, file: Path, scratch: Path) -> Path:
    """CLINC150 as prompt and response; its training split, with the domain as the client."""
    if name != "clinc150":
        return file
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    path = scratch / "clinc150.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            if row["split"] == "train":
                example = {"prompt": row["text"], "response": row["label"].replace("_", " ")}
                out.write(json.dumps({**example, "client_id": row["client_id"]}) + "\n")
    return path


def _result(
    method: str, seed: int, arguments: str, info: dict[str, Any], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    clients = sum(line["clients"] for line in lines)
    return {
        "method": method,
        "seed": seed,
        "arguments": arguments,
        "loss": [info["base"]["loss"], *(line["eval_loss"] for line in lines)],
        "accuracy": [info["base"]["accuracy"], info["final"]["accuracy"]],
        "up": info["bytes_up"] / clients,
        "down": info["bytes_down"] / clients,
        "bytes": [0, *(line["bytes_up"] + line["bytes_down"] for line in lines)],
        "training_seconds": sum(line["seconds"] for line in lines),
        "peak_rss": info["peak_rss"],
        "lr": info["config"]["lr"],
        "adapter_sha256": info["adapter_sha256"],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def _load(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())) if path.is_file() else []


def _table(name: str, results: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| method | seeds | lr | held-out loss, base | after, mean (min to max) | accuracy "
        "| up, per client and round | down | seconds of training | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS[name]:
        own = [r for r in results if r["method"] == method]
        if not own:
            continue
        ends = [r["loss"][-1] for r in own]
        mean = {key: statistics.mean(r[key] for r in own) for key in ("up", "down", "peak_rss")}
        rows.append(
            f"| {method} | {len(own)} | {own[0]['lr']:g} "
            f"| {statistics.mean(r['loss'][0] for r in own):.4f} "
            f"| {statistics.mean(ends):.4f} ({min(ends):.4f} to {max(ends):.4f}) "
            f"| {statistics.mean(r['accuracy'][1] for r in own):.1%} "
            f"| {_bytes(mean['up'])} | {_bytes(mean['down'])} "
            f"| {statistics.median(r['training_seconds'] for r in own):.0f} "
            f"| {mean['peak_rss'] / 1e9:.2f} GB |"
        )
    return "\n".join(rows)


def _bytes(count: float) -> str:
    return f"{count:,.0f} B" if count < 1e5 else f"{count / 1e6:.2f} MB"


def _plot(name: str, results: Sequence[dict[str, Any]]) -> None:
    """Held-out loss by round and by bytes; a band from the smallest to the largest seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="tight")
    for method in METHODS[name]:
        own = [r for r in results if r["method"] == method]
        if not own:
            continue
        losses = list(zip(*(r["loss"] for r in own), strict=True))
        mean = [statistics.mean(at) for at in losses]
        rounds = range(len(mean))
        (line,) = left.plot(rounds, mean, marker="o", markersize=3, label=method)
        low, high = [min(at) for at in losses], [max(at) for at in losses]
        left.fill_between(rounds, low, high, color=line.get_color(), alpha=0.15)
        sent = [statistics.mean(at) for at in zip(*(r["bytes"] for r in own), strict=True)]
        total = [sum(sent[: i + 1]) for i in rounds]
        right.plot(total[1:], mean[1:], marker="o", markersize=3, color=line.get_color())
    left.set_xlabel("round")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("held-out loss (nats per target)")
    right.set_xlabel("bytes, all clients, up and down")
    right.set_xscale("log")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / f"{name}.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
