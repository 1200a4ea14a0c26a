"""Trackio: a SQLite file in DIR/trackio, or where TRACKIO_DIR says.

`TRACKIO_DIR=DIR/trackio trackio show` shows it.
"""

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


class Tracker:
    """Metrics by round; the outcome as metrics of the last. See corolla.trackers.Tracker."""

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
        import trackio  # reads its folder when it is imported

        self.last = first_round - 1
        with redirect_stdout(io.StringIO()):  # it prints advice
            self.run = trackio.init(
                project="corolla",
                name=f"{name}-{run_id[:8]}",
                config={**config, "run_id": run_id},
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, values: Mapping[str, float], round: int) -> None:
        self.last = round
        self.run.log(dict(values), step=round)

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        self.run.log({**outcome, "done": float(done)}, step=self.last)
        import trackio

        with redirect_stdout(io.StringIO()):
            try:
                trackio.finish()
            except RuntimeError:  # begun by another thread: it does not know its current run
                self.run.finish()
