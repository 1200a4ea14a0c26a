"""Child processes: start, CPU time, a clean end, and how they are found again after a kill."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from corolla.host.files import write_atomic

_GRACE = 30.0
"""Seconds in which a child that is told to stop may end its work."""
_HANG_UP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""A terminal that goes away; Windows has no such signal."""


class Child:
    """A command whose output goes to `log`. On Windows its CPU time is not known."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log, self.beside, self.resumed = log, False, False
        self.cpu_seconds: float | None = None
        self.code: int | None = None
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then says stop
            )

    def ended(self) -> bool:
        """Whether it has ended; then `code` is its exit code and `cpu_seconds` what it used."""
        if self.code is not None:
            return True
        if not hasattr(os, "wait4"):
            self.code = self._process.poll()
            return self.code is not None
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return True

    def last_error(self) -> str:
        """The line of its log that says what is wrong, else the last one."""
        if self.code is not None and self.code < 0:
            return f"ended by signal {-self.code}" + ("; out of memory?" if self.code == -9 else "")
        lines = [s.strip() for s in self.log.read_text(errors="replace").splitlines() if s.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"no output, exit code {self.code}"])[-1]


def stop(children: Sequence[Child]) -> None:
    """Interrupt each by its process id; who has not ended in half a minute is killed."""
    for child in children:
        if not child.ended():
            child._process.send_signal(getattr(signal, "SIGINT", signal.SIGTERM))
    deadline = time.monotonic() + _GRACE
    while not all(child.ended() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        if not child.ended():
            child._process.kill()
            child.code = child._process.wait()


def when_orphaned(leave: Callable[[], None]) -> None:
    """Call `leave` once the process that holds this one's standard input open has ended."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held when Python ends
            pass
        leave()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of raising wherever the program happens to be.

    An exception between the start of a child and the note of it would leave it behind.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGINT, signal.SIGTERM, *_HANG_UP)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: with a last word, and no child left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, and what comes as Ctrl-C, waits for the end of what must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()
    old = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
    if asked.is_set():
        raise KeyboardInterrupt


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def note_process(path: Path, pid: int) -> None:
    """Keep a process id with the time of its start: ids are used again."""
    began = psutil.Process(pid).create_time()
    write_atomic(path, json.dumps({"pid": pid, "began": began}).encode())


def noted_process(path: Path) -> psutil.Process | None:
    """The process that `note_process` has noted, if it still lives.

    Raises OSError when that cannot be known, with no file left to open: it may be alive.
    """
    try:
        noted = json.loads(path.read_text())
        process = psutil.Process(int(noted["pid"]))
        same = abs(process.create_time() - float(noted["began"])) < 1
        return process if same and _lives(process) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def end(process: psutil.Process | None, grace: float) -> None:
    """Terminate a process, kill it when it does not end in time."""
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        deadline = time.monotonic() + grace
        while _lives(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _lives(process):
            process.kill()


def _lives(process: psutil.Process) -> bool:
    """A process that nobody waits for stays as a zombie: Flower waits for none."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
