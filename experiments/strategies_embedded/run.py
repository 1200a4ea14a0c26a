"""FedAvg, FFA-LoRA and FLoRA on the embedded model and data, three seeds each; prints a table.

    python experiments/strategies_embedded/run.py

One learning rate for all, so this illustrates what the strategies do and cost. It is no comparison.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from corolla import RunConfig, simulate

SEEDS = (0, 1, 2)


def main() -> int:
    """Run every strategy with every seed."""
    print("| strategy | held-out loss, base | after 5 rounds, mean (min to max) | up | down |")
    print("|---|---|---|---|---|")
    for strategy in ("fedavg", "ffa_lora", "flora"):
        base, final, up, down = [], [], [], []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as scratch:
                config = RunConfig(strategy=strategy, seed=seed, eval_clients=0, threads=1)
                summary = simulate(config, Path(scratch, "run"))
            base.append(summary.base["loss"])
            final.append(summary.final["loss"])
            up.append(summary.bytes_up)
            down.append(summary.bytes_down)
        print(
            f"| `{strategy}` | {statistics.mean(base):.3f} | {statistics.mean(final):.3f} "
            f"({min(final):.3f} to {max(final):.3f}) | {statistics.mean(up) / 1e6:.1f} MB "
            f"| {statistics.mean(down) / 1e6:.1f} MB |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
