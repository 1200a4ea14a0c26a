"""Child processes: what they say is kept, they are ended by id and start again when they die.

Also how many files this process may have open, which its children inherit.
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO

from corolla.host import processes

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINES = 50
"""Lines of a child that are held for its last words."""
_LOG_BYTES = 1 << 20
"""Size at which the log of a child with a listener is rotated; one old file is kept."""
_TAIL = 8192
"""Bytes of a log that are looked at: it grows for months."""
_FILES = 65536
_CODE_UNKNOWN = 255
"""Exit code of a child that the system has reaped: it must not pass for one that has succeeded."""
_LASTED = 120.0
"""Seconds of life after which a death is a first one again."""


class Restarts:
    """When a child that has died starts again: after a pause that doubles with each death.

    `dice` in [0, 1) makes pauses of many parents differ; by default each has its full length.
    """

    def __init__(
        self,
        longest: float = 30.0,
        dice: Callable[[], float] = lambda: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`longest`: seconds of the longest pause."""
        self.deaths = 0
        self._longest, self._dice, self._clock = longest, dice, clock
        self._began = self._due = 0.0

    @property
    def resting(self) -> bool:
        """True where a death is noted and the next start is yet to come."""
        return self._due > 0

    def over(self) -> None:
        """Begin a start, after which another death can be noted."""
        self._due = 0.0

    def began(self) -> None:
        """Note that a start has succeeded."""
        self._began = self._clock()

    def rest(self) -> float:
        """Note a death, once; the seconds until the next start."""
        now = self._clock()
        if not self._due:
            self.deaths = 1 if now - self._began > _LASTED else self.deaths + 1
            self._due = now + pause(self.deaths, self._dice(), self._longest)
        return self._due - now


def pause(deaths: int, dice: float, longest: float) -> float:
    """Seconds before a child starts again; `dice` in [0, 1) takes away up to a half."""
    return min(longest, 0.5 * 2.0 ** min(deaths, 10)) * (0.5 + 0.5 * dice)


class Child:
    """A command that runs in a session of its own: Ctrl-C reaches its parent alone.

    What it says goes to the end of `log`. Where there is a `listener`, that hears each line too,
    the log is bounded, and standard input stays open for as long as this process lives: the child
    can tell when its parent is gone. `note` keeps its process id while it runs.
    """

    files: Sequence[int] = ()
    """Open files of this process that the child has as well, under the same numbers."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        listener: Callable[[str], None] | None = None,
        note: Path | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        self.command, self.log, self.name = command, log, log.stem
        self.restarts = restarts or Restarts()
        self.lines = deque[str](maxlen=_LINES)
        """The last lines that a listener has heard."""
        self.code: int | None = None
        """Exit code of the last one that has ended."""
        self.cpu_seconds: float | None = None
        self._env, self._cwd, self._listener, self._note = env, cwd, listener, note
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return None if self.ended() or not self._process else self._process.pid

    def start(self, first_line: bytes = b"") -> None:
        """Start `command` in the place of the one before. Raises OSError.

        `first_line` is what a child with a listener reads on its standard input.
        """
        self.close()
        self.restarts.over()
        with nullcontext(subprocess.PIPE) if self._listener else self.log.open("ab") as output:
            self._process = process = subprocess.Popen(
                self.command,
                env=self._env,
                cwd=self._cwd,
                stdin=subprocess.PIPE if self._listener else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self.files,
            )
        self.restarts.began()
        self.code = self.cpu_seconds = None
        if self._note:
            with suppress(OSError):  # a full disk
                processes.note_process(self._note, process.pid)
        if self._listener and process.stdin and process.stdout:
            self.lines.clear()
            told = (process.stdout, self._listener)
            self._reader = threading.Thread(target=self._read, args=told, daemon=True)
            self._reader.start()
            self.tell(first_line)

    def tell(self, line: bytes) -> None:
        """Write to the standard input of one with a listener."""
        if self._process and self._process.stdin:
            with suppress(BrokenPipeError):  # it has ended already: `ended` will say so
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def wait(self) -> int | None:
        """Its exit code, once it has ended; None for one that was never started."""
        if self.code is None:
            self._reap(wait=True)
        return self.code

    def ended(self) -> bool:
        """Returns whether the child has ended: then `code` is known, its listener has heard all."""
        return self.code is not None or self._reap(wait=False)

    def tend(self) -> str | None:
        """Start it again when it is dead and its pause is over; says what happened, once."""
        if self.pid is not None:
            return None
        known, left = self.restarts.resting, self.restarts.rest()
        if not known:
            return f"{self.name} ended with code {self.code}; starting it again: {self.last_line()}"
        if left <= 0:
            self.start()
        return None

    def send(self, number: int) -> None:
        """Send a signal, by its id, unless it has ended."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Kill it unless it has ended; give back its pipe and its note."""
        if self._process is None:
            return
        self.send(getattr(signal, "SIGKILL", signal.SIGTERM))
        self._reap(wait=True)
        if self._process.stdin:
            with suppress(BrokenPipeError):  # a line that it has not read is still to be written
                self._process.stdin.close()
        self._process = None
        if self._note:
            self._note.unlink(missing_ok=True)

    def last_line(self) -> str:
        """Returns the last line of the child's log that tells something; "" where none does."""
        lines = tail(self.log).splitlines()
        told = (_COLOUR.sub("", line).strip() for line in reversed(lines))
        return next((line[-300:] for line in told if line and "EXPERIMENTAL" not in line), "")

    def last_words(self, mark: str = ":", silent: str = "") -> str:
        """The line that says why it has ended, else the last one.

        `mark` stands before a guess, `silent` before the exit code of one that has said nothing.
        """
        code = self.code or 0
        if code < 0:
            return f"ended by signal {-code}" + (f"{mark} out of memory?" if code == -9 else "")
        lines = (
            list(self.lines)
            if self._listener
            else [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        )
        said = [line for line in lines if line.strip()]
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        return (errors or said or [f"{silent}exit code {code}"])[-1]

    def _reap(self, wait: bool) -> bool:
        """Take the exit code of one that has ended, and its CPU time."""
        if self._process is None or self.code is not None:
            return False
        code = self._collect(self._process, wait)
        if code is None:
            return False
        self.code = code
        if self._reader:
            self._reader.join(5)
        return True

    def _collect(self, process: subprocess.Popen[bytes], wait: bool) -> int | None:
        if not hasattr(os, "wait4"):  # Windows, where its CPU time is not known
            return process.wait() if wait else process.poll()
        try:
            pid, status, usage = os.wait4(process.pid, 0 if wait else os.WNOHANG)
        except ChildProcessError:  # SIGCHLD is ignored here: the system has taken them
            process.wait()
            return _CODE_UNKNOWN
        if not pid:
            return None
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return process.returncode

    def _read(self, output: IO[bytes], listener: Callable[[str], None]) -> None:
        with output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                self.lines.append(line)
                self._keep(raw)
                with suppress(OSError):  # nobody listens, or a full disk: a child must not block
                    listener(line)

    def _keep(self, raw: bytes) -> None:
        with suppress(OSError):  # a full disk must not end a client
            with self.log.open("ab") as file:
                file.write(raw)
                size = file.tell()
            if size > _LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))


def stop(children: Sequence[Child], grace: float, number: int = signal.SIGTERM) -> None:
    """Send each a signal by its id; one that has not ended after `grace` seconds is killed."""
    for child in children:
        child.send(number)
    deadline = time.monotonic() + grace
    while any(child.pid for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        child.close()


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
    import resource  # Windows, where comparisons run too, has none

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FILES if soft == resource.RLIM_INFINITY else soft


def open_more_files() -> None:
    """Raise that to what the machine allows, _FILES at most: a connection is a file."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if wanted > open_files():
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
