"""A run that has been, or is under way, as an audit takes it: from its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ConfigError
from corolla.server.runs.folder import refuse_other_inputs, stored_run
from corolla.server.runs.setup import Setup, set_up
from corolla.server.runs.status import status


@dataclass(frozen=True)
class DoneRun:
    """The settings of a run, and what its run.json says of it."""

    folder: Path
    config: RunConfig
    clients: int
    """Number of its clients."""
    own_devices: bool
    """True where its clients were devices, whose rows are not on this machine."""
    stated: str
    """The guarantee that it states, in one line; "" without differential privacy."""

    def to_json(self) -> dict[str, Any]:
        """Returns the run's entry in an audit's JSON: its folder and guarantee (or None)."""
        return {"folder": str(self.folder), "stated": self.stated or None}


def read(folder: Path) -> DoneRun:
    """The run in `folder`. Raises ConfigError for another folder, ArtefactError for a damaged one.

    Its model, data and strategy are named as they were: relative paths begin at this folder.
    """
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"{folder} is no run's folder, it has no run.json: name the --out of a simulation or a "
            f"server"
        )
    config, _, _ = stored_run(folder)
    try:
        info = json.loads((folder / "run.json").read_text())
        private: Mapping[str, Any] = info.get("privacy", {})
        stated = str(private.get("line", ""))
        if stated and "ended" not in info:  # run.json is as it was at the start
            spent = status(folder).epsilon or 0.0
            stated = f"not at its end, epsilon {spent:.4g} so far at delta {config.delta:g}"
        own_devices = bool(info.get("own_devices", False))
        return DoneRun(folder, config, int(info["num_clients"]), own_devices, stated)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{folder / 'run.json'} cannot be read: {error!r}") from error


def load(config: RunConfig, done: DoneRun | None) -> Setup:
    """Loads the inputs of a run. Raises ConfigError unless the inputs are those of `done`."""
    if done is None:
        return set_up(config, None)
    loaded = set_up(config, None, deployed=done.own_devices)
    refuse_other_inputs(done.folder, config, loaded.facts, ("model", "data"))
    return loaded


def refuse_devices(done: DoneRun | None) -> None:
    """Raises ConfigError for a run whose rows are elsewhere, where an attack needs some of them."""
    if done is not None and done.own_devices:
        raise ConfigError(
            f"the rows of {done.folder} are on its clients' devices, and this audit trains on some "
            f"of them: give --data and the run's other settings instead"
        )
