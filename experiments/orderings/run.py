"""Do published orderings of strategies show at small scale? One comparison for each setting.

    python experiments/orderings/run.py short long many [--out FOLDER]
    python experiments/orderings/run.py clinc150 --file clinc150.jsonl --model FOLDER

Writes results-NAME.json beside this file and prints a table; the whole comparison, with its report,
stays in FOLDER/NAME and goes on from there when it was stopped. Data of clinc150: CLINC150 (Larson
et al., EMNLP 2019) as .jsonl with text, label, client_id (the domain) and split.

short, long: the embedded model, 3 of 6 clients a round, 24 local steps in all, as 12 rounds of 2 or
2 rounds of 12. many: 30 of 32 clients a round, 6 rounds of 3 steps. clinc150: intents on an encoder
(e.g. all-MiniLM-L6-v2), its 10 domains as clients, so that labels are not shared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from corolla.commands.compare.compare import compare
from corolla.commands.compare.grid import make_grid

_EMBEDDED: dict[str, Any] = {"eval_examples": 128, "eval_client_examples": 8}
_CLINC: dict[str, Any] = {
    "cohort": 10,
    "rounds": 6,
    "local_steps": 5,
    "batch_size": 16,
    "max_length": 32,
    "eval_examples": 450,
    "eval_every": 2,
    "eval_client_examples": 16,
}
SETTINGS: dict[str, tuple[list[str], dict[str, Any], tuple[float, ...]]] = {
    "short": (
        ["fedavg", "ffa_lora", "flora", "fedex_lora"],
        {**_EMBEDDED, "clients": 6, "cohort": 3, "rounds": 12, "local_steps": 2, "eval_every": 4},
        (),
    ),
    "long": (
        ["fedavg", "ffa_lora", "flora", "fedex_lora"],
        {**_EMBEDDED, "clients": 6, "cohort": 3, "rounds": 2, "local_steps": 12},
        (),
    ),
    "many": (
        ["fedavg", "ffa_lora", "rolora"],
        {**_EMBEDDED, "clients": 32, "cohort": 30, "rounds": 6, "local_steps": 3, "eval_every": 3},
        (),
    ),
    "clinc150": (["fedavg", "ffa_lora", "rolora", "fedex_lora"], _CLINC, (3e-3,)),
}
"""Name → strategies, options, learning rates to try (none: the usual one times 1/3, 1, 3)."""


def main() -> int:
    """Run the settings named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=SETTINGS)
    parser.add_argument("--file", type=Path, help="data of clinc150")
    parser.add_argument("--model", type=Path, help="encoder of clinc150")
    parser.add_argument("--out", type=Path, default=Path("runs/orderings"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    for name in given.names:
        methods, options, lrs = SETTINGS[name]
        if name == "clinc150":
            if not (given.file and given.model and given.file.is_file() and given.model.is_dir()):
                print(
                    "clinc150 needs --file and --model: a data file and a folder", file=sys.stderr
                )
                return 1
            options = {**options, "data": str(given.file), "model": str(given.model)}
        wanted = make_grid(methods, options=options, seeds=given.seeds, lrs=lrs)
        folder = given.out / name
        found = compare(
            wanted,
            folder,
            resume=(folder / "compare.json").is_file(),
            watch=lambda done, total, running, note: (
                print(f"{done}/{total} {note}", flush=True) if note else None
            ),
        )
        write(name, found)
    return 0


def write(name: str, found: dict[str, Any]) -> None:
    """Keep the numbers beside this file, and print them."""
    kept = ("label", "lr", "edge", "loss", "accuracy", "own_loss", "bytes", "aggregation_errors")
    summary = {
        "setting": name,
        "date": found["date"],
        "platform": found["platform"],
        "cores": found["cores"],
        "seeds": found["seeds"],
        "options": SETTINGS[name][1],
        "methods": [{key: entry.get(key) for key in kept} for entry in found["methods"]],
        "differences": found["held_out"],
        "failed": found["failed"],
    }
    path = Path(__file__).with_name(f"results-{name}.json")
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print("| strategy | lr | held-out loss | 95 % interval | accuracy | aggregate off by |")
    print("|---|---|---|---|---|---|")
    for entry in summary["methods"]:
        if not entry["loss"]:
            print(f"| `{entry['label']}` | no finished run | | | | |")
            continue
        loss, errors = entry["loss"], entry["aggregation_errors"] or []
        span = f"{loss['low']:.3f} to {loss['high']:.3f}" if loss["low"] is not None else ""
        off = f"{max(errors):.1e}" if errors else ""
        print(
            f"| `{entry['label']}` | {entry['lr']:g} | {loss['mean']:.3f} | {span} "
            f"| {entry['accuracy']['mean']:.1%} | {off} |"
        )


if __name__ == "__main__":
    sys.exit(main())
