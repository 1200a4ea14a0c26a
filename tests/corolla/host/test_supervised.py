"""Children: what they say, how they end, and that they are started again when they die."""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.host import processes, supervised
from corolla.host.processes import stoppable
from corolla.host.supervised import Child, Restarts, pause, stop

PYTHON = (sys.executable, "-S", "-c")
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
POLITE = """
import time
try:
    print('up', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print('saved')
    raise SystemExit(7)
"""
Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a Python child whose files lie in tmp_path, and ends it after the test."""
    made: list[Child] = []

    def begin(code: str, first_line: bytes = b"", name: str = "child", **options: Any) -> Child:
        made.append(Child([*PYTHON, code], tmp_path / f"{name}.log", **options))
        made[-1].start(first_line)
        return made[-1]

    yield begin
    for child in made:
        child.close()


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(child: Child) -> Child:
    until(child.ended)
    return child


# --- how it ends ----------------------------------------------------------------------------------


def test_exit_code_and_cpu_time_of_a_busy_child(start: Start) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\nraise SystemExit(3)"
    child = ended(start(busy))
    assert child.code == 3
    assert child.cpu_seconds is not None
    assert 0.5 <= child.cpu_seconds < 5
    assert child.ended()


def test_where_the_system_has_no_wait4_its_cpu_time_is_not_known(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "wait4")
    child, other = start("raise SystemExit(3)"), start(SLEEP, name="other")
    assert (ended(child).code, child.cpu_seconds) == (3, None)
    assert not other.ended()
    other.close()
    assert (other.code, other.cpu_seconds) == (-signal.SIGKILL, None)


def test_a_sleeping_child_uses_no_cpu_time_to_speak_of(start: Start) -> None:
    child = ended(start("import time; time.sleep(1)"))
    assert child.cpu_seconds is not None
    assert child.cpu_seconds < 1


def test_where_the_system_takes_the_dead_an_end_is_seen_all_the_same(start: Start) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = ended(start("raise SystemExit(3)"))
        assert (child.code, child.cpu_seconds) == (255, None)  # unknown: not a success
        child.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("print('error: the reason'); print('after'); raise SystemExit(1)", "the reason"),
        ("print('one'); print('two'); print(' '); raise SystemExit(1)", "two"),
        ("raise SystemExit(4)", "no output, exit code 4"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9; out of memory?"),
        ("import os; os.kill(os.getpid(), 15)", "ended by signal 15"),
    ],
)
def test_the_line_that_says_why(code: str, line: str, listened: bool, start: Start) -> None:
    child = ended(start(code, listener=str if listened else None))
    assert child.last_words(mark=";", silent="no output, ") == line


def test_stop_interrupts_all_and_waits_for_them(start: Start) -> None:
    both = [start(POLITE, name="a"), start(POLITE, name="b")]
    for one in both:
        until(lambda one=one: "up" in one.log.read_text())  # type: ignore[misc]
    stop(both, 30, signal.SIGINT)
    assert [one.code for one in both] == [7, 7]
    assert all("saved" in one.log.read_text() for one in both)


def test_a_background_job_can_interrupt_its_children(start: Start) -> None:
    """A shell starts it with SIGINT ignored, which its children would be as well.

    But it waits for signals, and one that has a handler is as usual in a child.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            child = start(POLITE)
            until(lambda: "up" in child.log.read_text())
            stop([child], 30, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.code == 7


@pytest.mark.parametrize(("number", "listened"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_child_that_will_not_stop_is_killed(
    number: signal.Signals, listened: bool, start: Start, tmp_path: Path
) -> None:
    deaf = f"import signal; signal.signal({int(number)}, signal.SIG_IGN); {SLEEP}"
    note = tmp_path / "child.pid"
    child = start(deaf, listener=str if listened else None, note=note)
    pid = child.pid
    assert pid is not None
    until(lambda: child.log.exists() and "up" in child.log.read_text())
    stop([child], 0.2, number)
    assert child.code == -signal.SIGKILL
    assert not psutil.pid_exists(pid)
    assert not note.exists()


def test_stop_terminates_by_default_and_at_once(start: Start) -> None:
    child = start(SLEEP)
    pid = child.pid
    assert pid is not None
    stop([child], 30)
    assert child.code == -signal.SIGTERM
    assert not psutil.pid_exists(pid)
    stop([child], 30)  # nothing is left to do


# --- what it says ---------------------------------------------------------------------------------


def test_what_a_child_says_is_heard_and_kept(start: Start) -> None:
    heard: list[str] = []
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)"
    child = ended(start(code, listener=heard.append))
    assert child.code == 7
    assert sorted(heard) == sorted(child.lines) == ["one", "two"]
    assert sorted(child.log.read_text().split()) == ["one", "two"]


def test_without_a_listener_all_goes_to_the_end_of_the_log(start: Start) -> None:
    child = start("import sys; print('one'); print('two', file=sys.stderr); print(input())")
    assert ended(child).code == 1  # it has nothing to read
    child.command = [*PYTHON, "print('again')"]
    child.start()
    assert ended(child).code == 0
    said = child.log.read_text().split()
    assert {"one", "two", "EOFError:"} <= set(said)
    assert said[-1] == "again"
    assert not child.lines


def test_the_log_of_a_child_with_a_listener_does_not_grow_for_ever(
    start: Start, tmp_path: Path
) -> None:
    ended(start("for _ in range(60): print('x' * 65536)", listener=str))
    size = sum(path.stat().st_size for path in tmp_path.glob("child.log*"))
    assert (1 << 20) < size < (3 << 20)


def test_its_first_line_of_input_reaches_it(start: Start) -> None:
    heard: list[str] = []
    ended(start("print(input().upper())", b"hello\n", listener=heard.append)).close()
    assert heard == ["HELLO"]


def test_it_is_told_more_while_it_runs_and_waited_for(start: Start) -> None:
    heard: list[str] = []
    child = start("print(input() + input()); raise SystemExit(5)", listener=heard.append)
    child.tell(b"a\n")
    child.tell(b"b\n")
    assert child.wait() == 5
    assert heard == ["ab"]
    assert child.wait() == 5
    child.tell(b"to nobody\n")


def test_one_that_was_never_started_is_not_waited_for(tmp_path: Path) -> None:
    assert Child([sys.executable], tmp_path / "child.log").wait() is None


def test_a_child_that_ends_before_it_reads_is_ended_as_any_other(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line cannot be written: not at once, and not when the pipe is closed either."""
    note, real = tmp_path / "child.pid", processes.note_process

    def note_its_end(path: Path, pid: int) -> None:  # what is done before the line is written
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        real(path, pid)

    monkeypatch.setattr(processes, "note_process", note_its_end)
    child = start("print('ends'); raise SystemExit(3)", b"hello\n", listener=str, note=note)
    assert note.exists()
    assert ended(child).code == 3
    assert list(child.lines) == ["ends"]
    child.close()
    assert not note.exists()


def test_a_listener_that_fails_does_not_block_a_child(start: Start) -> None:
    """More than a pipe holds: unless somebody reads on, the child would wait for ever."""

    def fail(line: str) -> None:
        raise BrokenPipeError

    child = ended(start("for _ in range(40): print('x' * 8192)", listener=fail))
    assert child.code == 0
    assert len(child.lines) == 40


def test_a_full_disk_stops_no_child(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processes, "note_process", full)
    child = ended(start("print('on')", listener=str, note=tmp_path / "child.pid"))
    assert child.code == 0


def test_the_last_line_of_a_log_of_any_size_is_read_from_its_end(tmp_path: Path) -> None:
    child = Child([*PYTHON, SLEEP], tmp_path / "child.log")
    assert child.last_line() == ""
    with child.log.open("wb") as file:
        file.truncate(1 << 40)  # a sparse TiB: no machine reads it whole
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last\n\n")
    assert child.last_line() == "the last"
    assert supervised.tail(child.log, child.log.stat().st_size - 6) == "last\n\n"


# --- how it starts again --------------------------------------------------------------------------


def test_pauses_double_up_to_the_longest_and_differ_by_the_dice() -> None:
    assert [pause(n, 1.0, 60) for n in (1, 2, 3, 7, 8, 500)] == [1, 2, 4, 60, 60, 60]
    assert [pause(n, 0.0, 60) for n in (1, 2, 8)] == [0.5, 1, 30]


def test_each_death_makes_the_pause_longer_until_one_has_lasted() -> None:
    now, dice = [1000.0], [1.0]
    restarts = Restarts(60, lambda: dice[0], lambda: now[0])
    restarts.began()
    known = [restarts.resting]
    assert [restarts.rest() for dice[0] in (1.0, 0.5)] == [1.0, 1.0]  # of one death
    known.append(restarts.resting)
    now[0] += 0.75
    assert restarts.rest() == 0.25
    for lasted, deaths, wait in ((0.0, 2, 1.5), (120.0, 3, 3.0), (120.5, 1, 0.75)):
        restarts.over()
        restarts.began()
        now[0] += lasted
        known.append(restarts.resting)
        assert (restarts.rest(), restarts.deaths) == (wait, deaths)
    assert known == [False, True, False, False, False]
    restarts.over()  # but it could not be started
    assert (restarts.rest(), restarts.deaths) == (0.75, 1)


def test_only_deaths_that_were_looked_at_count(start: Start) -> None:
    child = ended(start("", listener=str))
    first = child.restarts.rest()
    known = [child.restarts.resting]
    assert child.restarts.rest() <= first <= 1.0
    for _ in range(4):
        child.start()
        ended(child)
    known.append(child.restarts.resting)
    assert known == [True, False]
    assert child.restarts.rest() > 0
    assert child.restarts.deaths == 2


def test_a_child_that_dies_is_said_once_and_started_again(start: Start) -> None:
    now = [0.0]
    child = start(SLEEP, restarts=Restarts(clock=lambda: now[0]))
    first = child.pid
    assert first is not None
    assert child.tend() is None
    until(lambda: "up" in child.last_line())
    os.kill(first, signal.SIGKILL)
    until(lambda: child.pid is None)
    assert child.tend() == "child ended with code -9; starting it again: up"
    now[0] = 0.9
    assert child.tend() is None  # not at once
    assert child.pid is None
    now[0] = 1.0
    assert child.tend() is None
    assert child.pid not in (None, first)


def test_pauses_grow_with_every_death(start: Start) -> None:
    now = [0.0]
    child = start("pass", restarts=Restarts(clock=lambda: now[0]))
    pauses = []
    for _ in range(8):
        ended(child)
        assert child.tend()
        began = now[0]
        while child.tend() is None and child.restarts.resting:
            now[0] += 0.5
        pauses.append(now[0] - began)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_one_that_cannot_be_started_again_is_said_again(start: Start) -> None:
    now = [0.0]
    child = start("print('on')", restarts=Restarts(clock=lambda: now[0]))
    ended(child)
    child.command = [str(child.log.with_name("none"))]
    assert child.tend() == "child ended with code 0; starting it again: on"
    now[0] = 1.0
    with pytest.raises(FileNotFoundError):
        child.tend()
    assert child.tend() == "child ended with code 0; starting it again: on"
    assert child.restarts.deaths == 2


# --- files that may be open -----------------------------------------------------------------------


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
