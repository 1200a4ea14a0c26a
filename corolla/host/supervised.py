"""Long-lived child processes: started again when they die, ended by id; files that may be open."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GRACE = 15.0
"""Seconds in which a process that is told to end may do so."""
_TAIL = 8192
"""Bytes of a log that are looked at: it grows for months."""
_FILES = 65536
_LASTED = 120.0
"""Seconds of life after which a death is a first one again."""


class Process:
    """One child: started again when it dies, each time a little later, ended by its process id."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], logs: Path):
        self.name, self.command, self.env = name, command, dict(env)
        self.log = logs / f"{name}.log"
        self.deaths = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._due = 0.0

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
        self._began = time.monotonic()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    def tend(self) -> str | None:
        """Start it again when it is dead and its pause is over; says what happened, once."""
        if self.pid is not None:
            return None
        now = time.monotonic()
        if not self._due:
            lasted = now - self._began
            self.deaths = 1 if lasted > _LASTED else self.deaths + 1
            self._due = now + min(30.0, 0.5 * 2**self.deaths)
            code = self._process.returncode if self._process else None
            return f"{self.name} ended with code {code}; starting it again: {self.last_line()}"
        if now >= self._due:
            self._due = 0.0
            self.start()
        return None

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._process:
            self._process.wait()

    def last_line(self) -> str:
        """What its log said last."""
        lines = tail(self.log).splitlines()
        told = (_COLOUR.sub("", line).strip() for line in reversed(lines))
        return next((line[-300:] for line in told if line and "EXPERIMENTAL" not in line), "")


def tail(path: Path, start: int = 0) -> str:
    """The last of a text file, from byte `start` and at most _TAIL bytes; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read(_TAIL).decode(errors="replace")
    except OSError:
        return ""


def open_files() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FILES if soft == resource.RLIM_INFINITY else soft


def open_more_files() -> None:
    """Raise that to what the machine allows, _FILES at most: a connection is a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if wanted > open_files():
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
