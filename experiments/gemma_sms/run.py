"""Federated LoRA on a real small language model and real text messages; prints one table row.

    .venv/bin/python experiments/gemma_sms/run.py PATH/TO/sms.jsonl

The file is the NUS SMS Corpus (Chen and Kan 2013) as JSON lines with `client_id` and `text`; it
is not part of this repository. Needs `pip install 'corolla[llm]'`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

OPTIONS = "--model gemma-3-270m --clients 8 --rounds 2 --local-steps 4"


def main() -> int:
    """Run the command of the README and print what it measured."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print(f"usage: {sys.argv[0]} PATH/TO/sms.jsonl (JSON lines with client_id and text)")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "run")
        command = [sys.executable, "-m", "corolla", "simulate", *OPTIONS.split()]
        done = subprocess.run([*command, "--data", sys.argv[1], "--out", str(out)], check=False)
        if done.returncode:
            return done.returncode
        info = json.loads((out / "run.json").read_text())
    print(
        f"\n| {datetime.now(UTC):%Y-%m-%d} | {platform.machine()}, {platform.system()} "
        f"| {info['base']['loss']:.4f} | {info['final']['loss']:.4f} "
        f"| {info['peak_rss'] / 1e9:.2f} GB | {info['seconds']:.0f} s "
        f"| {info['bytes_up'] / 1e6:.1f} MB | `{info['adapter_sha256'][:16]}` |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
