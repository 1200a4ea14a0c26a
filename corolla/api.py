"""The commands as functions of Python that take and return plain values.

Each does what the command of its name does (`look` is `corolla data`), with the same files, and
raises CorollaError with the command's own line for whatever a user can cause. `settings` are keys
of a run, with the values that they have in TOML: `settings={"max_new_tokens": 32}`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from corolla.commands import artefacts
from corolla.commands.compare import compare as comparing
from corolla.commands.compare.grid import make_grid
from corolla.commands.data import look as looking
from corolla.commands.export.order import Order
from corolla.commands.export.order import export as carry_out
from corolla.commands.simulate import in_process
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.server.runs.observer import Observer
from corolla.server.runs.summary import Summary
from corolla.types import Metrics

__all__ = ["compare", "evaluate", "export", "look", "simulate"]


def simulate(
    config: RunConfig,
    folder: str | Path,
    observer: Observer | None = None,
    *,
    keep_updates: bool = False,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Summary:
    """Run a federation on this machine and leave its artefacts in `folder`, new or empty.

    `observer` hears of rounds, `on_step` the tokens of each local step. Returns the losses before
    and after, the lines of all rounds, and where everything is.
    """
    return in_process.simulate(
        config, Path(folder), observer, keep_updates=keep_updates, resume=resume, on_step=on_step
    )


def evaluate(
    result: str | Path,
    *,
    model: str | None = None,
    data: str | None = None,
    settings: Mapping[str, Any] = {},
) -> dict[str, Metrics]:
    """Score a run's result beside its base model on held-out examples: {"base": …, "adapter": …}.

    `result` is a run's folder, or its adapter/ or model/; model and data are those of its run
    unless given.
    """
    return artefacts.evaluate_adapter(Path(result), model, data, _given(settings))


def export(
    result: str | Path,
    to: Literal["merged", "adapter", "gguf"] = "merged",
    out: str | Path | None = None,
    *,
    model: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
) -> Sequence[str]:
    """Write a run's result in the form that others serve; a line for each thing written.

    `out` is a new folder, beside the result unless given. `rank` cuts the adapter.
    """
    folder = Path(out) if out is not None else None
    return carry_out(Order(Path(result), to, model, folder, dtype=dtype, rank=rank))


def compare(
    strategies: Sequence[str],
    folder: str | Path,
    *,
    settings: Mapping[str, Any] = {},
    seeds: int = 3,
    lrs: Sequence[float] = (),
    jobs: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """Compare strategies on equal terms; what results.json holds, beside it plots and a report.

    `strategies` are names, with settings of their own as NAME@key=value, or FILE.py:Class. `lrs`
    are tried by all.
    """
    grid = make_grid(strategies, None, {}, _given(settings), seeds=seeds, lrs=lrs, jobs=jobs)
    return comparing.compare(grid, Path(folder), jobs=jobs, resume=resume)


def look(
    data: str | Path, *, sample: int | None = None, settings: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Look at data before training, as `corolla data --json` does: whose it is, what is cut.

    `sample`: lengths of so many rows alone.
    """
    config = load(None, {"data": str(data)}, _given(settings))
    found = looking.look(config, looking.read(config), sample, lambda rows, what: rows)
    return found.to_json()


def _given(settings: Mapping[str, Any]) -> list[str]:
    """The same as the command line's KEY=VALUE."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
