"""How long commands take to start: from exec to the end of --version, of helps, to a first task.

    python -m experiments.bench.starting --json FILE

Each command runs in new processes, in turn with the others, so that load meets all alike. A ratio
divides the median CPU seconds of a command by those of a process that only imports torch,
transformers' classes of models and peft, which everything that trains has to wait for.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.bench.zeroth_order import Section, Took, command

ROOT = Path(__file__).resolve().parent.parent.parent
BARS = {"--version": 0.3, "--help": 0.5, "simulate, to the first task": 4.0}
"""Command → seconds by the clock that it may take on two idle cores, files in memory."""
LIBRARIES = "libraries of training"
COMMANDS: Mapping[str, Sequence[str]] = {
    "--version": ("--version",),
    "--help": ("--help",),
    "simulate --help": ("simulate", "--help"),
    "keys": ("keys",),
    "strategies": ("strategies",),
    "data embedded": ("data", "embedded"),
    "plan": ("plan",),
}
_FIRST_TASK = """
import os
from corolla.commands.simulate.in_process import InProcess

def ask(self, packets):
    os._exit(0)

InProcess.ask = ask
from corolla.cli.app import app
app()
"""


@dataclass(frozen=True)
class Options:
    """How often everything is measured. The fields are the options of the command."""

    repetitions: int = field(default=5, metadata={"help": "of each command, in turn"})
    threads: int = field(default=1, metadata={"help": "of the CPU, of a run"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the JSON file."""
    return command(__doc__, Options, {"starting": starting}, (), _nothing, arguments)


def starting(options: Options) -> Section:
    """Seconds of each command, and their ratios."""
    took: dict[str, list[Took]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(options.repetitions + 1):
            for name, words in commands(options, Path(scratch) / str(turn)).items():
                found = process(words)
                if turn:  # the first reads the files
                    took.setdefault(name, []).append(found)
    section = Section("starting: seconds of a new process")
    for name, each in took.items():
        section.times(name, each, 1.0, "s")
    medians = {row["contender"]: row for row in section.rows}
    for name in (*BARS, *(name for name in COMMANDS if name not in BARS)):
        ratio = float(medians[name]["cpu"]) / float(medians[LIBRARIES]["cpu"])
        bar = f"≤ {BARS[name]:g} s" if name in BARS else ""
        met = float(medians[name]["median"]) <= BARS[name] if name in BARS else None
        number = f"{name} / {LIBRARIES}, CPU"
        section.ratios.append({"number": number, "measured": ratio, "bar": bar, "met": met})
    return section


def commands(options: Options, out: Path) -> dict[str, list[str]]:
    """Name of a measurement → its command line."""
    corolla = [sys.executable, "-m", "corolla"]
    heavy = "import torch, peft; from transformers import PreTrainedModel"
    run = ["simulate", "--set", f"threads={options.threads}", "--out", str(out)]
    return {
        LIBRARIES: [sys.executable, "-c", heavy],
        **{name: [*corolla, *words] for name, words in COMMANDS.items()},
        "simulate, to the first task": [sys.executable, "-c", _FIRST_TASK, *run],
    }


def process(words: Sequence[str]) -> Took:
    """Seconds by the clock and CPU seconds of a process and its children, from exec to its end."""
    before = time.monotonic()
    child = subprocess.Popen(
        words, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(words[:6])} has ended with {child.returncode}")
    return Took(time.monotonic() - before, used.ru_utime + used.ru_stime)


def _nothing(name: str, options: Any) -> None:
    """No part of this bench is measured in a process of the bench's own."""


if __name__ == "__main__":
    sys.exit(main())
