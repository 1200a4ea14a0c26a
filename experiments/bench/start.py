"""How long a run of many rows takes to send its first task, and how much memory.

    python -m experiments.bench.start --threads 1 --json FILE

A file of JSON lines is written to a temporary folder, and a simulation of it begun twice in a new
process each: when nothing of the file is kept, and when its rows are. Each process ends when the
first task is sent to a client.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from corolla.commands.simulate.in_process import InProcess, simulate
from corolla.config.load import load
from corolla.data.rows import read_rows
from corolla.errors import StoppedError
from corolla.wire.packet import Packet
from experiments.bench.zeroth_order import Section, command, peak

ROOT = Path(__file__).resolve().parent.parent.parent
BARS = {"first start, s": 60.0, "second start, s": 15.0, "peak, MB": 1500.0, "kept / file": 1.2}
Measured = dict[str, float]


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    rows: int = field(default=1_000_000, metadata={"help": "of the file"})
    clients: int = field(default=1000, metadata={"help": "that have them in turn"})
    characters: int = field(default=945, metadata={"help": "of text in a row"})
    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    length: int = field(default=256, metadata={"help": "tokens of a sequence, at most"})
    threads: int = field(default=1, metadata={"help": "of the CPU"})
    folder: str = field(default="", metadata={"help": "for the file; the usual one for such"})

    def arguments(self) -> list[str]:
        """The command line that gives these options."""
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the JSON file."""
    return command(__doc__, Options, {"start": start}, ("begin",), begin, arguments)


def begin(name: str, options: Options) -> Measured:
    """Measures what this process has taken when the first task is sent; in a new process only.

    CPU seconds are of all its threads and children.
    """
    folder = Path(options.folder)
    given = {"data": str(folder / "rows.jsonl"), "model": options.model}
    few = ["rounds=1", "cohort=4", f"threads={options.threads}", f"max-length={options.length}"]
    config = load(None, given, few)
    taken: Measured = {}

    def ask(self: InProcess, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        """The first task is sent: that is all."""
        taken.update(cpu=sum(os.times()[:4]), peak=peak())
        raise StoppedError(f"{len(packets)} clients are asked")

    with (
        tempfile.TemporaryDirectory(dir=folder) as out,
        mock.patch.object(InProcess, "ask", ask),
        suppress(StoppedError),
    ):
        simulate(config, Path(out))
    return taken


def write(path: Path, options: Options) -> None:
    """The file: clients have rows in turn, cut from the embedded data at places drawn by a seed."""
    draw = random.Random(0)
    rows, _ = read_rows("embedded")
    text = " ".join(f"{row.prompt} {row.text}" for row in rows)
    asked = 2 * options.characters // 5
    with path.open("w", encoding="utf-8") as file:
        for number in range(options.rows):
            at = draw.randrange(len(text) - options.characters)
            row = {
                "client_id": f"c{number % options.clients:04d}",
                "prompt": text[at : at + asked],
                "response": text[at + asked : at + options.characters],
            }
            file.write(json.dumps(row) + "\n")


def start(options: Options) -> Section:
    """Two starts of a run, the second with the rows that the first has kept."""
    with tempfile.TemporaryDirectory(dir=options.folder or None) as scratch:
        folder = Path(scratch)
        write(folder / "rows.jsonl", options)
        size = (folder / "rows.jsonl").stat().st_size
        taken = {name: _begun(folder, options) for name in ("first start", "second start")}
        kept = sum(own.stat().st_size for own in (folder / "kept").rglob("*") if own.is_file())
    found = Section(
        f"start: {options.rows:,} rows of {options.clients:,} clients, {size / 1e6:.0f} MB"
    )
    for name, own in taken.items():
        row: dict[str, str | float] = {
            "process": name,
            "wall, s": own["wall"],
            "cpu, s": own["cpu"],
        }
        found.rows.append({**row, "peak, MB": own["peak"] / 1e6})
        found.ratios.append(_held(f"{name}, s", own["cpu"]))
    found.ratios.append(_held("peak, MB", max(own["peak"] for own in taken.values()) / 1e6))
    found.ratios.append(_held("kept / file", kept / size))
    return found


def _held(name: str, value: float) -> dict[str, str | float | bool | None]:
    return {
        "number": name,
        "measured": value,
        "bar": f"≤ {BARS[name]:g}",
        "met": value <= BARS[name],
    }


def _begun(folder: Path, options: Options) -> Measured:
    """`begin` in a new process, its time by the clock, and its memory with that of its children."""
    given = Options(**{**asdict(options), "folder": str(folder)}).arguments()
    environment: Mapping[str, str] = {**os.environ, "COROLLA_CACHE": str(folder / "kept")}
    before, together = time.monotonic(), 0.0
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.bench.start", "--child", "begin", *given],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as child:
        while child.poll() is None:
            together = max(together, _resident(child.pid))
            time.sleep(1)
        wall, told = time.monotonic() - before, child.communicate()[0]
    if child.returncode:
        raise RuntimeError(f"a start has ended with {child.returncode}")
    measured: Any = json.loads(told.splitlines()[-1])
    return {**measured, "peak": max(measured["peak"], together), "wall": wall}


def _resident(process: int) -> float:
    """Bytes of a process and its children, memory that they share counted once; Linux only."""
    found = 0.0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            found += 1024 * float(line.split()[1]) if line.startswith("Pss:") else 0
        for threads in Path(f"/proc/{process}/task").glob("*/children"):
            found += sum(_resident(int(child)) for child in threads.read_text().split())
    except OSError:  # it has ended meanwhile, or this system has no such files
        pass
    return found


if __name__ == "__main__":
    sys.exit(main())
