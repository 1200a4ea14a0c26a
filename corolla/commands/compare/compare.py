"""`corolla compare`: strategies on equal terms. A composition root: each cell is a run of its own.

A cell is one strategy, learning rate and seed: a run folder that a child process fills. All of a
strategy's learning rates are tried at the first seed; the best, by the loss on the clients' own
validation examples, is run with the other seeds. The held-out set that is reported chooses nothing.
With differential privacy each strategy has one learning rate.
"""

import json
import math
import os
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import tomli_w

from corolla.commands.compare import results as comparison
from corolla.commands.compare.report import write_comparison
from corolla.commands.compare.results import Cell
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.errors import ConfigError, CorollaError, StoppedError
from corolla.host.files import write_atomic
from corolla.host.processes import Child, stop, stoppable
from corolla.models import adapter_files, devices
from corolla.strategies import files, registry
from corolla.version import __version__

FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates that are tried without --lrs, relative to each strategy's usual one."""
QUICK = {"cohort": 4, "eval_examples": 64, "eval_client_examples": 4}
"""With the embedded model, unless given: six strategies take less than half an hour on 2 cores."""
_BEAT = 0.1


@dataclass(frozen=True)
class Method:
    """A strategy with its settings and the learning rates to try."""

    label: str
    config: RunConfig
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """A cell to run. `keep`: its updates are kept until the aggregation error is measured."""

    method: Method
    lr: float
    seed: int
    keep: bool

    @property
    def name(self) -> str:
        return f"{self.method.label}-{self.lr:g}-{self.seed}"

    @property
    def config(self) -> RunConfig:
        return self.method.config.model_copy(update={"lr": self.lr, "seed": self.seed})


@dataclass(frozen=True)
class Plan:
    """What is compared: everything that decides the numbers, and what stands in compare.json."""

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]

    def search(self, method: Method) -> list[Job]:
        """All learning rates at the first seed: the same number for every method."""
        return [self._job(method, lr, self.seeds[0]) for lr in method.lrs]

    def others(self, method: Method, lr: float) -> list[Job]:
        """The other seeds; the first one's run is that of the search."""
        return [self._job(method, lr, seed) for seed in self.seeds[1:]]

    def cells(self) -> int:
        """How many runs this is when none fails."""
        return sum(len(m.lrs) + len(self.seeds) - 1 for m in self.methods)

    def to_json(self) -> dict[str, Any]:
        methods = [
            {
                "label": m.label,
                "lrs": list(m.lrs),
                "config": m.config.model_dump(mode="json"),
                "file": files.digest(m.config.strategy),
            }
            for m in self.methods
        ]
        return {"methods": methods, "seeds": list(self.seeds)}

    def _job(self, method: Method, lr: float, seed: int) -> Job:
        config = method.config
        kept = config.parameters == "lora" and not config.buffer and config.dp != "client"
        keep = seed == self.seeds[-1] and kept
        return Job(method, lr, seed, keep)


def plan(
    names: Sequence[str],
    file: Path | None = None,
    options: Mapping[str, object] | None = None,
    settings: Sequence[str] = (),
    *,
    seeds: int = 3,
    lrs: Sequence[float] = (),
    jobs: int = 0,
) -> Plan:
    """The comparison that a command line asks for. Raises ConfigError for what makes no sense.

    With `jobs` other than 1 every cell gets one thread, unless `threads` is given.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: expected at least 1; 3 give an interval")
    if any(not 0 < lr < float("inf") for lr in lrs) or len({f"{lr:g}" for lr in lrs}) < len(lrs):
        raise ConfigError(f"--lrs {', '.join(map(str, lrs))}: expected different positive numbers")
    if jobs < 0:
        raise ConfigError(f"--jobs {jobs}: expected 1 or more; 0 is as many as cores")
    methods: list[Method] = []
    for name in names:
        config = load(file, {**(options or {}), "strategy": name}, settings)
        given = config.model_fields_set
        changes: dict[str, Any] = {}
        if config.model == config.data == "embedded":
            changes = {key: value for key, value in QUICK.items() if key not in given}
            if "cohort" in changes and config.clients:
                changes["cohort"] = min(changes["cohort"], config.clients)
        if jobs != 1 and not config.threads:
            changes["threads"] = 1
        factors = FACTORS if config.dp == "none" else (1.0,)
        tried = tuple(lrs) or tuple(float(f"{config.lr * f:.3g}") for f in factors)
        if config.dp != "none" and len(tried) > 1:
            raise ConfigError(
                f"--lrs {', '.join(f'{lr:g}' for lr in tried)}: with dp={config.dp} clients' "
                f"examples may not choose one, for no epsilon counts that: give one, or leave "
                f"--lrs out for each strategy's usual one"
            )
        methods.append(Method(_label(name), config.model_copy(update=changes), tried))
    if any(registry.traits(registry.find(m.config.strategy)).personal for m in methods):
        # Personal models are those of clients that train: all methods are measured on these.
        participants = {"eval_participants": True}
        methods = [replace(m, config=m.config.model_copy(update=participants)) for m in methods]
    labels = [method.label for method in methods]
    if not labels:
        raise ConfigError(f"name strategies to compare: {', '.join(registry.STRATEGIES)}")
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"{twice} is named twice: each strategy once, classes by different names")
    first = methods[0].config
    if first.eval_clients < 1:
        raise ConfigError("eval-clients=0 leaves no clients whose examples choose the lr: raise it")
    return Plan(tuple(methods), tuple(range(first.seed, first.seed + seeds)))


def learning_rates(text: str) -> list[float]:
    """'1e-3,3e-3' → [0.001, 0.003]. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--lrs {text!r}: expected numbers between commas") from error


def _label(name: str) -> str:
    """`flora`; of one's own the name of the class."""
    return name.rpartition(":")[2] if ":" in name else name.replace("-", "_")


Watch = Callable[[int, int, Sequence[str], str], None]
"""Told of cells done, of all, names of those running, and a line worth printing or nothing."""


def compare(
    wanted: Plan,
    folder: Path,
    *,
    jobs: int = 0,
    resume: bool = False,
    watch: Watch = lambda done, total, running, note: None,
) -> dict[str, Any]:
    """Run all cells and write results.json, results.csv, report.html and plots/ into `folder`.

    Returns the results; "failed" lists cells that did not finish. Raises ConfigError for a folder
    that is in use or was begun otherwise, StoppedError on Ctrl-C, CorollaError when no method
    has finished.
    """
    federated.load(
        wanted.methods[0].config
    )  # a mistake in the data is said once, not by every cell
    alone = jobs == 0 and devices.pick_device(wanted.methods[0].config.device).type != "cpu"
    most = 1 if alone else jobs or _cores()
    _prepare(wanted, folder, resume)
    runner = _Runner(wanted, folder, most, fixed=jobs > 0, watch=watch)
    with stoppable() as asked:
        runner.run(asked)
    finals = {m.label: runner.finals(m) for m in wanted.methods}
    if not any(finals.values()):
        raise CorollaError(
            f"no cell has finished: {next(iter(runner.failed.values()), 'none ran')}"
        )
    results = comparison.results(
        [_described(m) for m in wanted.methods],
        {m.label: runner.losses(m) for m in wanted.methods},
        finals,
    )
    results |= {
        "seeds": list(wanted.seeds),
        "failed": runner.failed,
        "diverged": runner.diverged,
        "jobs": runner.jobs,
        "differing_settings": _differing(wanted),
        **_begun(folder),
    }
    write_comparison(folder, results)
    return results


def _described(method: Method) -> dict[str, Any]:
    cls = registry.find(method.config.strategy)
    approximate = method.config.robust != "none" or method.config.uplink.lossy
    return {
        "label": method.label,
        "strategy": method.config.strategy,
        "personal": registry.traits(cls).personal,
        "aggregates": "other" if approximate else cls.aggregates,
        "trainers": list(cls.trainers),
    }


def _differing(wanted: Plan) -> dict[str, dict[str, Any]]:
    """Settings that are not the same for all methods, such as local steps: key → label → value."""
    dumps = {m.label: m.config.model_dump(mode="json") for m in wanted.methods}
    first = next(iter(dumps.values()))
    return {
        key: {label: dump[key] for label, dump in dumps.items()}
        for key in first
        if key not in ("strategy", "lr", "seed")
        and any(d[key] != first[key] for d in dumps.values())
    }


def _prepare(wanted: Plan, folder: Path, resume: bool) -> None:
    """Make the folder with compare.json. Raises ConfigError unless it is new, empty or the same."""
    path = folder / "compare.json"
    if resume:
        if not path.is_file():
            raise ConfigError(f"nothing to resume in {folder}: it has no compare.json")
        _same_plan(_begun(folder)["plan"], json.loads(json.dumps(wanted.to_json())), folder)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is not empty: add --resume, or name another folder")
    packages = ("flwr", "torch", "peft", "transformers", "safetensors")
    begun = {
        "plan": wanted.to_json(),
        "corolla": __version__,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "platform": platform.platform(),
        "cores": _cores(),
        "memory": psutil.virtual_memory().total,
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        (folder / "cells").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make --out {folder}: {error.strerror}") from error
    _write(path, begun)


def _begun(folder: Path) -> dict[str, Any]:
    """compare.json. Raises ConfigError when it cannot be read."""
    try:
        begun: dict[str, Any] = dict(json.loads((folder / "compare.json").read_text()))
        return {**begun, "plan": dict(begun["plan"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'compare.json'} cannot be read: {error!r}") from error


def _same_plan(stored: Any, asked: Any, folder: Path, where: str = "") -> None:
    """Raises ConfigError for the first thing that differs."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        pairs = [(key, stored.get(key), asked.get(key)) for key in {**stored, **asked}]
    elif isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        pairs = [
            (asked[i].get("label", i), stored[i], asked[i])
            if isinstance(asked[i], dict)
            else (i, stored[i], asked[i])
            for i in range(len(asked))
        ]
    elif stored != asked:
        raise ConfigError(
            f"{folder} was begun with {where.strip('.')} = {stored!r}, found {asked!r}: give the "
            f"same command with --resume, or name another folder"
        )
    else:
        return
    for key, before, now in pairs:
        _same_plan(before, now, folder, f"{where}.{key}")


class _Runner:
    """Runs cells side by side, search first; knows what is finished and what has failed."""

    def __init__(
        self,
        wanted: Plan,
        folder: Path,
        jobs: int,
        fixed: bool,
        watch: Watch,
    ) -> None:
        self.plan, self.folder, self.jobs, self.fixed, self.watch = (
            wanted,
            folder / "cells",
            jobs,
            fixed,
            watch,
        )
        self._most = jobs
        if not fixed and wanted.methods[0].config.model != "embedded":
            self.jobs = 1  # until a cell has shown how much memory it takes
        self.failed: dict[str, str] = {}
        self.diverged: dict[str, str] = {}
        self._cells: dict[str, Cell] = {}
        self._children: list[tuple[Job, Child]] = []

    def run(self, asked: Event) -> None:
        """All cells. Raises StoppedError when `asked` to stop, once all children have ended."""
        waiting = deque(job for method in self.plan.methods for job in self.plan.search(method))
        searching = {m.label: {job.name for job in self.plan.search(m)} for m in self.plan.methods}

        def settled(job: Job) -> None:
            """The last cell of a search brings the other seeds."""
            searching[job.method.label].discard(job.name)
            chosen = comparison.best_lr(self.losses(job.method))
            if job.seed == self.plan.seeds[0] and not searching[job.method.label] and chosen:
                waiting.extend(self.plan.others(job.method, chosen))

        try:
            while waiting or self._children:
                while waiting and len(self._children) < self.jobs and not asked.is_set():
                    job = waiting.popleft()
                    if self._finished(job):
                        settled(job)
                    else:
                        self._start(job)
                time.sleep(_BEAT)
                for job, child in [pair for pair in self._children if pair[1].ended()]:
                    self._children.remove((job, child))
                    self._end(job, child)
                    settled(job)
                self._say("")
                if asked.is_set():
                    raise StoppedError(
                        f"stopped; {len(self._cells)} of {self.plan.cells()} cells are finished: "
                        f"go on with --resume --out {self.folder.parent}"
                    )
        finally:
            stop([child for _, child in self._children])

    def losses(self, method: Method) -> dict[float, float | None]:
        """Learning rate → mean loss on the clients' own examples; None for one without a result."""
        found = {job.lr: self._cells.get(job.name) for job in self.plan.search(method)}
        losses = {lr: _chosen_by(cell) if cell else None for lr, cell in found.items()}
        return {lr: x if x is not None and math.isfinite(x) else None for lr, x in losses.items()}

    def finals(self, method: Method) -> list[Cell]:
        """The finished cells, one a seed, at the chosen learning rate."""
        chosen = comparison.best_lr(self.losses(method))
        if chosen is None:
            return []
        names = [f"{method.label}-{chosen:g}-{seed}" for seed in self.plan.seeds]
        return [self._cells[name] for name in names if name in self._cells]

    def _start(self, job: Job) -> None:
        run = self.folder / job.name
        half_done = (run / "run.json").is_file()
        if run.exists() and not half_done:
            shutil.rmtree(run)
        toml = self.folder / f"{job.name}.toml"
        write_atomic(
            toml, tomli_w.dumps(_without_none(job.config.model_dump(mode="json"))).encode()
        )
        command = [sys.executable, "-m", "corolla", "simulate", "--config", str(toml)]
        for key, field in RunConfig.model_fields.items():
            if getattr(job.config, key) is None and field.default is not None:
                command += ["--set", f"{key}=null"]  # TOML has no null
        command += ["--out", str(run)]
        command += ["--keep-updates"] if job.keep else []
        command += ["--resume"] if half_done else []
        child = Child(command, self.folder / f"{job.name}.log")
        for _, other in self._children:
            child.beside = other.beside = True
        child.resumed = half_done
        self._children.append((job, child))

    def _end(self, job: Job, child: Child) -> None:
        run = self.folder / job.name
        if child.code != 0:
            self._fail(job, child.last_error())
            return
        costs: dict[str, Any] = {
            "cpu_seconds": None if child.resumed else child.cpu_seconds,
            "beside": child.beside,
        }
        if job.keep:
            costs["aggregation_errors"] = comparison.aggregation_errors(run)
            costs["initial_sha256"] = adapter_files.adapter_hash(run / "global" / "round-000")
        _write(self.folder / f"{job.name}.json", costs)
        self._read(job)
        if cell := self._cells.get(job.name):
            self._fit(cell.peak_rss)
            self._say(f"{job.name}: loss {cell.loss:.4f}")

    def _fail(self, job: Job, why: str) -> None:
        """A learning rate that is too high for a search is a result of it, not a failure."""
        tried = len(job.method.lrs) > 1 and job.seed == self.plan.seeds[0]
        diverged = tried and "lower lr" in why
        (self.diverged if diverged else self.failed)[job.name] = why
        self._say(f"{job.name} {'diverged' if diverged else 'failed'}: {why}")

    def _finished(self, job: Job) -> bool:
        """Whether an earlier command has finished it; then it is read."""
        if (self.folder / f"{job.name}.json").is_file():
            self._read(job)
            return True
        return False

    def _read(self, job: Job) -> None:
        run, costs = self.folder / job.name, self.folder / f"{job.name}.json"
        stored = json.loads(costs.read_text())
        cell = comparison.read_cell(run, _described(job.method), stored)
        if math.isfinite(cell.loss):
            self._cells[job.name] = cell
        else:
            self._fail(job, f"the loss is {cell.loss} after the last round: lower lr")
        for kept in ("updates", "global"):
            shutil.rmtree(run / kept, ignore_errors=True)

    def _fit(self, peak: int) -> None:
        """Fewer side by side where memory would not hold them; what --jobs says is obeyed."""
        if not self.fixed:
            free = psutil.virtual_memory().available + len(self._children) * peak
            self.jobs = max(1, min(self._most, int(free // max(1, peak))))

    def _say(self, note: str) -> None:
        over = len(self._cells) + len(self.failed) + len(self.diverged)
        running = [job.name for job, _ in self._children]
        self.watch(over, max(over, self.plan.cells()), running, note)


def _chosen_by(cell: Cell) -> float | None:
    """What decides between learning rates; where clients measure nothing, there is only one."""
    return cell.loss if cell.epsilon is not None else cell.own_loss


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value


def _write(path: Path, value: object) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
