"""Weights & Biases: a run in DIR/wandb, offline unless WANDB_MODE says otherwise.

`wandb sync DIR/wandb/offline-run-*` uploads it later; a resumed run has the same id and goes on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


class Tracker:
    """Metrics by round, the outcome in the run's summary. See corolla.trackers.Tracker."""

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "corolla"),
            id=run_id,
            name=name,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow",
            config=dict(config),
            settings=quiet,
        )

    def log(self, values: Mapping[str, float], round: int) -> None:
        self.run.log(dict(values), step=round)

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        self.run.summary.update(dict(outcome))
        self.run.finish(exit_code=0 if done else 1)
