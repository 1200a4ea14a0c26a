"""A run's folder: made, opened again, and its run.json and metrics.jsonl read and written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.errors import ArtefactError, ConfigError
from corolla.host.files import write_atomic
from corolla.server.runs.journal import NAME

_BEFORE_IT_BEGINS = {NAME, "run.json.part"}
"""Names of files that a run writes before run.json is whole."""


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make the output folder, for its owner alone: a journal is not for others.

    A run that was killed before it wrote run.json has not begun: its folder is as good as empty.
    Raises ConfigError unless the folder is new or empty, or resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: name a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    unbegun = NAME in names and names <= _BEFORE_IT_BEGINS
    if names and not (resume or unbegun):
        raise ConfigError(f"--out {folder} is not empty: add --resume, or name another folder")
    if resume and not (folder / "run.json").is_file():
        raise ConfigError(f"nothing to resume in {folder}: it has no run.json")
    try:
        if unbegun:
            (folder / NAME).unlink()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make --out {folder}: {error.strerror}") from error


def stored_run(folder: Path) -> tuple[RunConfig, str, bool]:
    """Config, run id and keep_updates of a run's folder. Raises ArtefactError when damaged."""
    try:
        info = json.loads((folder / "run.json").read_text())
        return validate(info["config"]), str(info["run_id"]), bool(info["keep_updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / 'run.json'} cannot be read: {error!r}") from error


def stored_warnings(folder: Path) -> list[str]:
    """The sentences of all warnings of a run's folder; none where run.json cannot be read."""
    try:
        info = json.loads((folder / "run.json").read_text())
        return [str(warning["text"]) for warning in info["warnings"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def refuse_other_inputs(
    folder: Path,
    config: RunConfig,
    facts: Mapping[str, Any],
    inputs: Sequence[str] = ("model", "data", "availability"),
) -> None:
    """Raises ConfigError when the model or the data changed since the run began."""
    before = json.loads((folder / "run.json").read_text())
    for what in inputs:
        if before.get(f"{what}_sha256") != facts.get(f"{what}_sha256"):
            raise ConfigError(
                f"the {what} ({getattr(config, what)}) is not what {folder} was "
                f"begun with: restore it, or start a new run"
            )


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Replace run.json."""
    write_atomic(folder / "run.json", (json.dumps(info, indent=2) + "\n").encode())


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace metrics.jsonl."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(folder / "metrics.jsonl", text.encode())


def committed_lines(folder: Path, round: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a committed round."""
    path = folder / "metrics.jsonl"
    if round == 0 or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [line for line in lines if line["round"] <= round]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
