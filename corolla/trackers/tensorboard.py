"""TensorBoard: event files in DIR/tensorboard. `tensorboard --logdir DIR` shows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Scalars by round; the config and the outcome as texts. See corolla.trackers.Tracker."""

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        # What a run that was killed wrote after its last checkpoint is hidden.
        purge = first_round if first_round > 1 else None
        self.folder = folder / "tensorboard"
        self.writer = SummaryWriter(str(self.folder), purge_step=purge)
        self._text("config", {**config, "run_id": run_id})

    def log(self, values: Mapping[str, float], round: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, round)
        self.writer.flush()

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        if not self.folder.is_dir():  # the run kept nothing; the writer's thread would raise
            return
        self._text("outcome", {"status": "done" if done else "stopped", **outcome})
        self.writer.close()

    def _text(self, tag: str, content: Mapping[str, Any]) -> None:
        lines = json.dumps(dict(content), indent=2).splitlines()
        self.writer.add_text(tag, "\n".join(f"    {line}" for line in lines), 0)
