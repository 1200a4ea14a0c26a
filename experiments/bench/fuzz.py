"""Mutated replies, tasks and protocol messages: no exception escapes, no bound is broken.

    python -m experiments.bench.fuzz --cases 100000 --json FILE
    python -m experiments.bench.fuzz guided

Sections: replies (through the gate and into an aggregate), messages (what phones, gateways and
Flower carry), requests (of nodes, to the server's front), native (what the C++ client reads; needs
a build of it), tasks (through a device's worker), guided (replies, chosen by coverage; needs
atheris).
Case i of a section is the same on every machine.
"""

import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corolla.errors import WireError
from corolla.server.rounds.gate import most_bytes
from corolla.server.rounds.verdicts import Code
from experiments.bench import fuzz_front, fuzz_native, mutations
from experiments.bench.fuzz_targets import devices, mutate, readers, targets
from experiments.bench.zeroth_order import Section, command, peak, resident, restart_peak

ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 5
_TOGETHER = 32
"""Cases between two looks at memory: each look costs as much as a few cases."""


@dataclass(frozen=True)
class Options:
    """How many. The fields are the options of the command."""

    cases: int = field(
        default=100_000, metadata={"help": "mutations of replies, of messages, and of requests"}
    )
    native: int = field(default=10_000, metadata={"help": "mutations for each native parser"})
    build: str = field(default="build/native", metadata={"help": "folder of the native client"})
    tasks: int = field(default=5_000, metadata={"help": "mutations of tasks: some are trained on"})
    runs: int = field(default=100_000, metadata={"help": "inputs of the guided section"})
    first: int = field(default=0, metadata={"help": "number of the first case"})
    threads: int = field(default=1, metadata={"help": "of the CPU; 0: as torch chooses"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (), lambda kind, options: {}, arguments)


# --- replies --------------------------------------------------------------------------------------


def replies(options: Options) -> Section:
    """Mutated replies of every kind through the gate, and into the aggregate of one round."""
    kinds, section = targets(), Section("replies: verdicts by kind of reply")
    counts: dict[str, Counter[Code]] = {target.name: Counter() for target in kinds}
    worst = dict.fromkeys(counts, 0.0)
    for target in kinds:  # before memory counts
        judged, worst[target.name] = target.examine(target.honest)
        assert judged.verdict.accepted, (target.name, judged.verdict)
    largest = max(most_bytes(target.expect) for target in kinds)

    def case(rng: random.Random) -> Callable[[], None]:
        target = rng.choice(kinds)
        mutated = mutate(rng, target)

        def check() -> None:
            judged, moved = target.examine(mutated)
            assert moved <= 1 + 1e-5, f"{target.name} moves the model by {moved} bounds"
            counts[target.name][judged.verdict.code] += 1
            worst[target.name] = max(worst[target.name], moved)

        return check

    facts = many("replies", options.first, options.cases, case)
    codes = [code for code in Code if any(counts[name][code] for name in counts)]
    for name, own in counts.items():
        row: dict[str, str | float] = {"reply": name, "cases": sum(own.values())}
        row |= {code.value: own[code] for code in codes}
        section.rows.append({**row, "largest change / bound": worst[name]})
    section.notes = [
        *facts,
        f"The largest payload that any of these may have: {largest:,} bytes",
        "Cases that a mutation leaves as they were, or changes within the bound, are accepted",
    ]
    return section


def many(
    name: str, first: int, count: int, case: Callable[[random.Random], Callable[[], None]]
) -> list[str]:
    """Run numbered cases; in words, what escaped and how memory grew.

    `case` makes one and gives what examines it: memory counts that alone.
    """
    escaped: list[str] = []
    most, before = 0.0, resident()
    for start in range(first, first + count, _TOGETHER):
        numbers = range(start, min(start + _TOGETHER, first + count))
        made = [(number, case(random.Random(f"{name} {number}"))) for number in numbers]
        now = resident()
        restart_peak()
        for number, check in made:
            try:
                check()
            except BaseException as error:  # also what a library written in Rust panics with
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                escaped.append(f"case {number}: {error!r:.300} at {where.name}:{where.lineno}")
        most = max(most, peak() - now)
    return [
        f"{count:,} cases, {len(escaped)} exceptions escaped",
        f"Resident memory: at most {most / 2**20:.1f} MiB more while a case is read, "
        f"{(resident() - before) / 2**20:.1f} MiB more after all",
        *escaped[:_SHOWN],
    ]


# --- messages -------------------------------------------------------------------------------------


def messages(options: Options) -> Section:
    """Mutated messages through the functions that read them."""
    kinds, section = readers(), Section("messages: what their readers say")
    counts: Counter[tuple[str, bool]] = Counter()
    for data, _, read in list(kinds.values())[:-1]:
        read(data)

    def case(rng: random.Random) -> Callable[[], None]:
        name = rng.choice(list(kinds))
        data, change, read = kinds[name]
        mutated = change(rng, data) if rng.random() < 0.8 else mutations.raw(rng, data)

        def check() -> None:
            try:
                read(mutated)
                counts[name, True] += 1
            except WireError as error:
                assert "\n" not in str(error), f"more than one line: {error}"
                counts[name, False] += 1

        return check

    section.notes = many("messages", options.first, options.cases, case)
    for name in kinds:
        good, bad = counts[name, True], counts[name, False]
        section.rows.append({"message": name, "cases": good + bad, "read": good, "refused": bad})
    return section


# --- requests and the native client ---------------------------------------------------------------


def requests(options: Options) -> Section:
    """Mutated requests through the protocol and the application of the server's front."""
    section = Section("requests: what the front answers")
    counts: Counter[str] = Counter()
    with fuzz_front.served() as served:

        def case(rng: random.Random) -> Callable[[], None]:
            data = fuzz_front.request(rng)

            def check() -> None:
                counts[", ".join(map(str, served.statuses(data)[:1])) or "nothing"] += 1

            return check

        section.notes = many("requests", options.first, options.cases, case)
    section.rows = [
        {"first answer": code, "cases": count} for code, count in sorted(counts.items())
    ]
    return section


def native(options: Options) -> Section:
    """Mutated messages through the parsers of the C++ client, in a process of its own."""
    section = Section("native: what the parsers of the C++ client say")
    build, escaped, grown = Path(options.build), list[str](), 0
    if not (build / "corolla-native-check").exists():
        section.notes = [
            f"no corolla-native-check in {build}: make phone, or name one with --build"
        ]
        return section
    for name in fuzz_native.kinds():
        found = fuzz_native.examine(build, name, options.first, options.native)
        escaped += [f"{name}: {what}" for what in found.escaped]
        grown = max(grown, found.grown)
        row: dict[str, str | float] = {"message": name, "cases": options.native}
        section.rows.append({**row, "read": found.read, "refused": found.refused})
    section.notes = [
        f"{options.native * len(section.rows):,} cases, {len(escaped)} exceptions escaped",
        f"Resident memory: at most {grown / 2**20:.1f} MiB more while cases are read",
        *escaped[:_SHOWN],
    ]
    return section


# --- tasks ----------------------------------------------------------------------------------------


def tasks(options: Options) -> Section:
    """Mutated tasks to a device's worker, which still does the true one afterwards, bit for bit."""
    section = Section("tasks: what a device makes of them")
    with tempfile.TemporaryDirectory() as scratch:
        kinds = devices(Path(scratch), rank=2, local_steps=1, batch_size=2, max_length=32)
        counts: Counter[tuple[str, str]] = Counter()

        def case(rng: random.Random) -> Callable[[], None]:
            name = rng.choice(list(kinds))
            mutated = mutations.task(rng, kinds[name].task)

            def check() -> None:
                counts[name, kinds[name].examine(mutated)] += 1

            return check

        section.notes = many("tasks", options.first, options.tasks, case)
        for name, own in kinds.items():
            same = own.worker(own.client, own.task).payload == own.reply.payload
            said = {what: counts[name, what] for what in ("refused", "missing", "error", "done")}
            section.rows.append(
                {
                    "task": name,
                    "cases": sum(said.values()),
                    **said,
                    "same afterwards": "yes" if same else "no",
                }
            )
    return section


# --- guided by coverage ---------------------------------------------------------------------------


def guided(options: Options) -> Section:
    """Replies that libFuzzer makes from the valid ones, guided by the branches they reach."""
    section = Section("guided: replies chosen by coverage")
    with tempfile.TemporaryDirectory() as scratch:
        for i, target in enumerate(targets()):
            size = len(target.honest.header).to_bytes(2, "little")
            seed = bytes([i]) + size + target.honest.header + target.honest.payload
            Path(scratch, f"{i}").write_bytes(seed)
        command = [sys.executable, "-m", "experiments.bench.fuzz_guided", scratch]
        command += [
            f"-runs={options.runs}",
            "-seed=1",
            "-max_len=65536",
            f"-artifact_prefix={scratch}/",
        ]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ran.stderr.splitlines()
    if any("No module named 'atheris'" in line for line in lines):
        section.notes = ["atheris is not installed: pip install atheris"]
        return section
    done = [" ".join(line.split()) for line in lines if "DONE" in line]
    section.notes = [
        f"{options.runs:,} inputs, "
        + ("0 exceptions escaped" if ran.returncode == 0 else "stopped by an exception"),
        *done,
        *([] if ran.returncode == 0 else lines[-30:]),
    ]
    return section


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "replies": replies,
    "messages": messages,
    "requests": requests,
    "native": native,
    "tasks": tasks,
    "guided": guided,
}

if __name__ == "__main__":
    sys.exit(main())
