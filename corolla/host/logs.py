"""Structured logs: one JSON object a line, with the run, the round and the client it is about.

    log = logs.logger("server")
    with logs.bind(round=3):
        log.info("asked", clients=8)
    {"time": "2025-01-31T12:00:00.123456Z", "level": "info", "logger": "server", "event": "asked",
     "run": "5f…", "round": 3, "client": null, "clients": 8}

Nothing is written, not even warnings, until `configure` has named a file or a stream. Never log
what a device's data say: only counts, names and reasons.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from corolla.errors import ConfigError

_ROOT = logging.getLogger("corolla")
_ROOT.addHandler(logging.NullHandler())
_BOUND: ContextVar[Mapping[str, object]] = ContextVar("bound", default=MappingProxyType({}))
_USUAL = ("run", "round", "client")
_MOST = 16 << 20
"""Bytes of a log file; twice that are kept."""


@dataclass(frozen=True)
class Logger:
    """Writes events of one part of the program; facts are what JSON can hold, else their str."""

    name: str

    def debug(self, event: str, **facts: object) -> None:
        self._log(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: object) -> None:
        self._log(logging.INFO, event, facts)

    def warning(self, event: str, **facts: object) -> None:
        self._log(logging.WARNING, event, facts)

    def error(self, event: str, **facts: object) -> None:
        self._log(logging.ERROR, event, facts)

    def _log(self, level: int, event: str, facts: Mapping[str, object]) -> None:
        found = {**_BOUND.get(), **facts}
        _ROOT.getChild(self.name).log(level, "%s", event, extra={"facts": found})


def logger(name: str) -> Logger:
    """The logger of a part: "server", "daemon", "gateway", …"""
    return Logger(name)


@contextmanager
def bind(**facts: object) -> Iterator[None]:
    """Put facts (run, round, client, …) into every line of this thread or task until the end."""
    token = _BOUND.set({**_BOUND.get(), **facts})
    try:
        yield
    finally:
        _BOUND.reset(token)


def configure(target: Path | TextIO, run_id: str = "", level: int = logging.INFO) -> None:
    """Append lines to a file or a stream. A file that grows large is moved to NAME.1.

    `run_id` is the run of lines that bind none. Replaces what was configured before. A disk that
    is full later loses lines, never the run. Raises ConfigError when the file cannot be opened.
    """
    unconfigure()
    try:
        handler = _File(target) if isinstance(target, Path) else _Stream(target)
    except OSError as error:
        raise ConfigError(f"cannot write the log {target}: {error.strerror}") from error
    handler.setFormatter(_Line(run_id))
    _ROOT.addHandler(handler)
    _ROOT.setLevel(level)


def unconfigure() -> None:
    """Stop writing; close the file."""
    for handler in [h for h in _ROOT.handlers if isinstance(h, (_File, _Stream))]:
        _ROOT.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _File(WatchedFileHandler):
    """Its second to last part is kept beside it. Several processes may write to the same file."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)  # opens it anew where another process has moved it
        path = Path(self.baseFilename)
        with suppress(OSError):
            if path.stat().st_size > _MOST:
                path.replace(path.with_name(f"{path.name}.1"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in logging
        """A line is lost."""


class _Stream(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in logging
        """A line is lost."""


class _Line(logging.Formatter):
    """A record as one line of JSON; records of plain `logging` under "corolla" come out too."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run = run_id or None

    def format(self, record: logging.LogRecord) -> str:
        facts: Mapping[str, object] = getattr(record, "facts", None) or dict(_BOUND.get())
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("corolla."),
            "event": record.getMessage(),
            **dict.fromkeys(_USUAL),
            "run": self._run,
        }
        given = {name: value for name, value in facts.items() if name not in line}
        usual = {name: facts[name] for name in _USUAL if name in facts}
        return json.dumps(_plain({**line, **usual, **given}), default=str)


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
