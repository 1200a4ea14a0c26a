"""Experiment trackers that may watch a run: each is one file, one library and one extra.

Everything is written below the run's folder, and nothing leaves the machine unless the user has
told the library so. A tracker changes nothing in a run: one that fails is turned off.
"""

import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from corolla.errors import ConfigError

TRACKERS = {file.name: f"{__name__}.{file.name}" for file in pkgutil.iter_modules(__path__)}
"""Name (of the file, the library and the extra) → module with a class Tracker."""

_SCORES = ("base", "final", "fairness")
_TOTALS = ("seconds", "bytes_up", "bytes_down", "peak_rss")


class Tracker(Protocol):
    """One library. Made when a run starts; may raise anything."""

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], first_round: int
    ) -> None:
        """Begin a run in `folder`, or go on with that of the same id when first_round > 1."""

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Numbers of one round."""

    def finish(self, outcome: Mapping[str, float], done: bool) -> None:
        """The last call: final numbers, and whether the run came to its end."""


class Tracked:
    """An observer that passes numbers on to one tracker, until that fails."""

    def __init__(self, name: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.name, self.folder, self.warn = name, folder, warn
        self._tracker: Tracker | None = None

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        with self._one_warning():
            config, name = facts["config"], self.folder.resolve().name
            made = importlib.import_module(TRACKERS[self.name]).Tracker
            self._tracker = made(self.folder, str(facts["run_id"]), name, config, first_round)
        if first_round == 1:
            self._log({f"eval_{key}": value for key, value in facts["base"].items()}, 0)

    def warned(self, text: str) -> None: ...

    def round_started(self, round: int, cohort: int) -> None: ...

    def replied(self, client: str) -> None: ...

    def round_ended(self, line: Mapping[str, Any]) -> None:
        self._log({key: value for key, value in line.items() if key != "round"}, line["round"])

    def close(self) -> None:
        """Hand over what run.json says of the end, once."""
        if not self._tracker:
            return
        with self._one_warning():
            path = self.folder / "run.json"  # not there: nothing of the run is kept
            info = json.loads(path.read_text()) if path.is_file() else {}
            facts = {key: info[key] for key in _SCORES if key in info}
            facts["total"] = {key: info[key] for key in _TOTALS if key in info}
            self._tracker.finish(flat(facts), info.get("status") == "done")
        self._tracker = None

    def _log(self, values: Mapping[str, Any], round: int) -> None:
        if self._tracker:
            with self._one_warning():
                self._tracker.log(numbers(values), round)

    @contextmanager
    def _one_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library raises, the run goes on
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.warn(f"tracker {self.name} failed and is off; the run is not affected: {reason}")


def open_trackers(names: Sequence[str], folder: Path, warn: Callable[[str], None]) -> list[Tracked]:
    """Observers for trackers by name; nothing is written before the run starts.

    Raises ConfigError for an unknown name or a library that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"unknown tracker {name!r}: known are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracker {name} is not installed: pip install 'corolla[{name}]'")
    return [Tracked(name, folder, warn) for name in dict.fromkeys(names)]


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, warn: Callable[[str], None]
) -> Iterator[list[Tracked]]:
    """`open_trackers`, closed at the end, however the run ends."""
    trackers = open_trackers(names, folder, warn)
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers."""
    kinds = (int, float)
    return {k: float(v) for k, v in values.items() if isinstance(v, kinds) and type(v) is not bool}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of nested mappings: {"final": {"loss": 2}} → {"final/loss": 2.0}."""
    found = {before + key: value for key, value in numbers(values).items()}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}/")
    return found
