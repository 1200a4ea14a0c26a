"""Signals of this process, a free port, and notes by which processes are found after a kill."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from corolla.host.files import write_atomic

_HANG_UP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""A terminal that goes away; Windows has no such signal."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that no proxy reaches: to it they would be itself."""


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
    with _noticed(asked, (signal.SIGINT, signal.SIGTERM, *_HANG_UP)):
        yield asked


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: with a last word, and no child left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _interrupt(*_: object) -> None:
    """Do what Ctrl-C does, also where that is ignored, as in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, and SIGTERM where it comes as Ctrl-C, waits for the end of what must be whole."""
    asked = threading.Event()
    as_interrupt = signal.getsignal(signal.SIGTERM) is _interrupt
    with _noticed(asked, (signal.SIGINT, *((signal.SIGTERM,) if as_interrupt else ()))):
        yield
    if asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def _noticed(asked: threading.Event, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Let signals set an event; what was ignored when this process began does nothing, but SIGTERM.

    A shell that starts a program in the background, and nohup, have reasons to ignore Ctrl-C and
    the end of a terminal. Children are not to inherit the former: they are stopped by it. A thread
    other than the main one gets no signals.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                ignored = signal.getsignal(number) is signal.SIG_IGN and number != signal.SIGTERM
                if ignored and number in _HANG_UP:
                    continue
                handler = _nothing if ignored else lambda *_: asked.set()
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(*_: object) -> None:
    """A signal that does nothing here, and what it does by default in a child."""


def bypass_proxies() -> None:
    """Calls on loopback, of this process and of its children, go past the environment's proxies."""
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in told.split(",") if host.strip()]
    hosts += [host for host in _LOOPBACK if host not in hosts]
    for name in ("no_proxy", "NO_PROXY"):  # some libraries read one of them alone
        os.environ[name] = ",".join(hosts)


def named_proxies() -> str:
    """Proxies of the environment, as ` (https_proxy=…)` without passwords; "" without any."""
    names = ("http_proxy", "https_proxy", "all_proxy")
    found = {
        name: os.environ[name]
        for known in names
        for name in (known, known.upper())
        if os.environ.get(name)
    }
    shown = (f"{name}={address.rpartition('@')[2]}" for name, address in found.items())
    return f" ({', '.join(shown)})" if found else ""


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
