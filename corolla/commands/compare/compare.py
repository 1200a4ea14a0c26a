"""`corolla compare`: strategies on equal terms. A composition root: each cell is a run of its own.

A cell is one strategy, learning rate and seed: a run folder that a child process fills. The
held-out set that is reported chooses nothing.
"""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from corolla.client.device.machine import cores
from corolla.commands.compare.grid import ComparisonGrid
from corolla.commands.compare.report import write_comparison
from corolla.commands.compare.results import results
from corolla.commands.compare.runner import Runner, Watch
from corolla.data import federated
from corolla.errors import ConfigError, CorollaError
from corolla.host.files import write_atomic
from corolla.host.processes import stoppable
from corolla.models import devices
from corolla.version import __version__


def compare(
    grid: ComparisonGrid,
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
    first = grid.methods[0].config
    data = federated.load(first)  # a mistake in the data is said once, not by every cell
    if data.validation_reported and any(len(method.lrs) > 1 for method in grid.methods):
        raise ConfigError(
            f"{first.data} has no test rows, so the validation rows of clients would choose the "
            f"learning rate and be reported: mark rows with split=test, or give one rate (--lrs)"
        )
    alone = jobs == 0 and devices.pick_device(first.device).type != "cpu"
    most = 1 if alone else jobs or cores()
    _prepare(grid, folder, resume)
    runner = Runner(grid, folder, most, fixed=jobs > 0, watch=watch)
    with stoppable() as asked:
        runner.run(asked)
    finals = {m.label: runner.finals(m) for m in grid.methods}
    if not any(finals.values()):
        raise CorollaError(
            f"no cell has finished: {next(iter(runner.failed.values()), 'none ran')}"
        )
    compared = {
        **results(
            [method.describe() for method in grid.methods],
            {method.label: runner.losses(method) for method in grid.methods},
            finals,
        ),
        "seeds": list(grid.seeds),
        "failed": runner.failed,
        "diverged": runner.diverged,
        "jobs": runner.jobs,
        "differing_settings": _differing(grid),
        **_begun(folder),
    }
    write_comparison(folder, compared)
    return compared


def _differing(grid: ComparisonGrid) -> dict[str, dict[str, Any]]:
    """Settings that are not the same for all methods, such as local steps: key → label → value."""
    dumps = {m.label: m.config.model_dump(mode="json") for m in grid.methods}
    first = next(iter(dumps.values()))
    return {
        key: {label: dump[key] for label, dump in dumps.items()}
        for key in first
        if key not in ("strategy", "lr", "seed")
        and any(d[key] != first[key] for d in dumps.values())
    }


def _prepare(grid: ComparisonGrid, folder: Path, resume: bool) -> None:
    """Make the folder with compare.json. Raises ConfigError unless it is new, empty or the same."""
    path = folder / "compare.json"
    if resume:
        if not path.is_file():
            raise ConfigError(f"nothing to resume in {folder}: it has no compare.json")
        _refuse_another_grid(_begun(folder)["plan"], json.loads(json.dumps(grid.to_json())), folder)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is not empty: add --resume, or name another folder")
    packages = ("flwr", "torch", "peft", "transformers", "safetensors")
    begun = {
        "plan": grid.to_json(),
        "corolla": __version__,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "platform": platform.platform(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        (folder / "cells").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot make --out {folder}: {error.strerror}") from error
    write_atomic(path, (json.dumps(begun, indent=2) + "\n").encode())


def _begun(folder: Path) -> dict[str, Any]:
    """compare.json. Raises ConfigError when it cannot be read."""
    try:
        begun: dict[str, Any] = dict(json.loads((folder / "compare.json").read_text()))
        return {**begun, "plan": dict(begun["plan"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'compare.json'} cannot be read: {error!r}") from error


def _refuse_another_grid(stored: Any, asked: Any, folder: Path, where: str = "") -> None:
    """Raise ConfigError for the first thing that differs from what the folder was begun with."""
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
        _refuse_another_grid(before, now, folder, f"{where}.{key}")
