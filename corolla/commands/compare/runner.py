"""Runs the cells of a comparison side by side, each in a child process that fills a run folder."""

import json
import math
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import tomli_w

from corolla.commands.compare.cells import Cell, aggregation_errors, read_cell
from corolla.commands.compare.grid import ComparisonGrid, Job, Method
from corolla.commands.compare.results import best_lr
from corolla.config.run import RunConfig
from corolla.errors import StoppedError
from corolla.host.files import write_atomic
from corolla.host.supervised import Child, stop
from corolla.models.files import adapter_files

_BEAT = 0.1
"""Seconds between two looks at the children."""
_GRACE = 30.0
"""Seconds in which a cell that is told to stop may end its work."""

Watch = Callable[[int, int, Sequence[str], str], None]
"""Called with the numbers of cells done and of all, names of those running, and a note or ""."""


@dataclass
class _Running:
    """A cell whose child is at work."""

    job: Job
    child: Child
    resumed: bool
    """True where the cell goes on with a run of an earlier command."""
    beside: bool = False
    """True where another cell has run at the same time."""


class Runner:
    """Runs cells side by side, search first; knows what is finished and what has failed."""

    def __init__(
        self, grid: ComparisonGrid, folder: Path, jobs: int, fixed: bool, watch: Watch
    ) -> None:
        self.grid, self.folder, self.fixed, self.watch = grid, folder / "cells", fixed, watch
        self.jobs = self._most = jobs
        if not fixed and grid.methods[0].config.model != "embedded":
            self.jobs = 1  # until a cell has shown how much memory it takes
        self.failed: dict[str, str] = {}
        self.diverged: dict[str, str] = {}
        self._cells: dict[str, Cell] = {}
        self._running: list[_Running] = []

    def run(self, asked: Event) -> None:
        """All cells. Raises StoppedError when `asked` to stop, once all children have ended."""
        waiting = deque(job for method in self.grid.methods for job in self.grid.search(method))
        searching = {m.label: {job.name for job in self.grid.search(m)} for m in self.grid.methods}

        def settled(job: Job) -> None:
            """The last cell of a search brings the other seeds."""
            searching[job.method.label].discard(job.name)
            chosen = best_lr(self.losses(job.method))
            if job.seed == self.grid.seeds[0] and not searching[job.method.label] and chosen:
                waiting.extend(self.grid.others(job.method, chosen))

        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs and not asked.is_set():
                    job = waiting.popleft()
                    if self._finished(job):
                        settled(job)
                    else:
                        self._start(job)
                time.sleep(_BEAT)
                for cell in [cell for cell in self._running if cell.child.ended()]:
                    self._running.remove(cell)
                    self._end(cell)
                    settled(cell.job)
                self._say("")
                if asked.is_set():
                    raise StoppedError(
                        f"stopped; {len(self._cells)} of {self.grid.cells()} cells are finished: "
                        f"go on with --resume --out {self.folder.parent}"
                    )
        finally:
            stop([cell.child for cell in self._running], _GRACE, signal.SIGINT)

    def losses(self, method: Method) -> dict[float, float | None]:
        """Learning rate → mean loss on the clients' own examples; None for one without a result."""
        found = {job.lr: self._cells.get(job.name) for job in self.grid.search(method)}
        losses = {lr: _chosen_by(cell) if cell else None for lr, cell in found.items()}
        return {lr: x if x is not None and math.isfinite(x) else None for lr, x in losses.items()}

    def finals(self, method: Method) -> list[Cell]:
        """The finished cells, one a seed, at the chosen learning rate."""
        chosen = best_lr(self.losses(method))
        if chosen is None:
            return []
        names = [method.cell(chosen, seed) for seed in self.grid.seeds]
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
        log = self.folder / f"{job.name}.log"
        log.write_bytes(b"")  # of this command alone
        cell = _Running(job, Child(command, log), half_done, beside=bool(self._running))
        cell.child.start()
        for other in self._running:
            other.beside = True
        self._running.append(cell)

    def _end(self, ended: _Running) -> None:
        job, child = ended.job, ended.child
        run = self.folder / job.name
        if child.code != 0:
            self._fail(job, child.last_words(mark=";", silent="no output, "))
            return
        costs: dict[str, Any] = {
            "cpu_seconds": None if ended.resumed else child.cpu_seconds,
            "beside": ended.beside,
        }
        if job.keep:
            costs["aggregation_errors"] = aggregation_errors(run)
            costs["initial_sha256"] = adapter_files.adapter_hash(run / "global" / "round-000")
        stored = json.dumps(costs, indent=2) + "\n"
        write_atomic(self.folder / f"{job.name}.json", stored.encode())
        self._read(job)
        if cell := self._cells.get(job.name):
            self._fit(cell.peak_rss)
            self._say(f"{job.name}: loss {cell.loss:.4f}")

    def _fail(self, job: Job, why: str) -> None:
        """A learning rate that is too high for a search is a result of it, not a failure."""
        tried = len(job.method.lrs) > 1 and job.seed == self.grid.seeds[0]
        diverged = tried and "lower lr" in why
        (self.diverged if diverged else self.failed)[job.name] = why
        self._say(f"{job.name} {'diverged' if diverged else 'failed'}: {why}")

    def _finished(self, job: Job) -> bool:
        """Returns whether an earlier command has finished the job; its result is then read."""
        if (self.folder / f"{job.name}.json").is_file():
            self._read(job)
            return True
        return False

    def _read(self, job: Job) -> None:
        run, costs = self.folder / job.name, self.folder / f"{job.name}.json"
        stored = json.loads(costs.read_text())
        cell = read_cell(run, job.method.describe(), stored)
        if math.isfinite(cell.loss):
            self._cells[job.name] = cell
        else:
            self._fail(job, f"the loss is {cell.loss} after the last round: lower lr")
        for kept in ("updates", "global"):
            shutil.rmtree(run / kept, ignore_errors=True)

    def _fit(self, peak: int) -> None:
        """Fewer side by side where memory would not hold them; what --jobs says is obeyed."""
        if not self.fixed:
            free = psutil.virtual_memory().available + len(self._running) * peak
            self.jobs = max(1, min(self._most, int(free // max(1, peak))))

    def _say(self, note: str) -> None:
        over = len(self._cells) + len(self.failed) + len(self.diverged)
        running = [cell.job.name for cell in self._running]
        self.watch(over, max(over, self.grid.cells()), running, note)


def _chosen_by(cell: Cell) -> float | None:
    """Returns the loss that picks a learning rate: the only loss where clients measure nothing."""
    return cell.loss if cell.epsilon is not None else cell.choosing_loss


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value
