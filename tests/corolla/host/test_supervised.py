"""Children that are started again, and ended by their own ids."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from corolla.host import supervised
from corolla.host.supervised import Process

SLEEP = [sys.executable, "-S", "-c", "print('up', flush=True); import time; time.sleep(60)"]
Made = Callable[[list[str]], Process]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Made]:
    made: list[Process] = []

    def start(command: list[str]) -> Process:
        made.append(Process("child", command, os.environ, tmp_path))
        made[-1].start()
        return made[-1]

    yield start
    for process in made:
        process.stop()


def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_dies_is_said_once_and_started_again(make: Made) -> None:
    child = make(SLEEP)
    first = child.pid
    assert first is not None
    assert child.tend() is None
    until(lambda: "up" in child.last_line())
    os.kill(first, signal.SIGKILL)
    until(lambda: child.pid is None)
    told = child.tend()
    assert told == "child ended with code -9; starting it again: up"
    began = time.monotonic()
    assert child.tend() is None  # not at once
    assert child.pid is None
    until(lambda: child.tend() is None and child.pid is not None)
    assert time.monotonic() - began > 0.9
    assert child.pid != first


def test_pauses_grow_with_every_death(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(f"{supervised.__name__}.time.monotonic", lambda: now[0])
    child = make([sys.executable, "-S", "-c", "pass"])
    pauses = []
    for _ in range(8):
        until_dead(child)
        assert child.tend()
        began = now[0]
        while child.tend() is None and child._due:
            now[0] += 0.5
        pauses.append(now[0] - began)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def until_dead(child: Process) -> None:
    assert child._process is not None
    child._process.wait(20)


def test_stop_ends_it_and_kills_what_does_not_listen(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "GRACE", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    for code in (SLEEP[-1], deaf + SLEEP[-1]):
        child = make([*SLEEP[:-1], code])
        pid = child.pid
        until(lambda child=child: "up" in child.last_line())  # type: ignore[misc]
        child.stop()
        assert pid is not None
        assert not psutil.pid_exists(pid)


def test_more_files_may_be_open_and_never_fewer() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        supervised.open_more_files()
        now, kept = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert now > 256
        assert kept == hard
        supervised.open_more_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (now, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_last_line_of_a_log_of_any_size_is_read_from_its_end(tmp_path: Path) -> None:
    child = Process("child", SLEEP, os.environ, tmp_path)
    assert child.last_line() == ""
    with child.log.open("wb") as file:
        file.truncate(1 << 40)  # a sparse TiB: no machine reads it whole
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last\n\n")
    assert child.last_line() == "the last"
    assert supervised.tail(child.log, child.log.stat().st_size - 6) == "last\n\n"
