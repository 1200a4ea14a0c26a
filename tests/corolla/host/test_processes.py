import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from corolla.host.processes import (
    Child,
    end,
    note_process,
    noted_process,
    stop,
    terminate_as_interrupt,
    uninterrupted,
)

SLEEP = [sys.executable, "-S", "-c", "print('up', flush=True); import time; time.sleep(60)"]
SLEEPER = "import time; print('ready', flush=True); time.sleep(60)"


def child(code: str, tmp_path: Path, name: str = "log") -> Child:
    return Child([sys.executable, "-c", code], tmp_path / name)


def wait(one: Child, seconds: float = 30) -> Child:
    deadline = time.monotonic() + seconds
    while not one.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return one


def test_exit_code_and_cpu_time_of_a_busy_child(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\nraise SystemExit(3)"
    ended = wait(child(busy, tmp_path))
    assert ended.code == 3
    assert ended.cpu_seconds is not None
    assert 0.5 <= ended.cpu_seconds < 5
    assert ended.ended()


def test_a_sleeping_child_uses_no_cpu_time_to_speak_of(tmp_path: Path) -> None:
    ended = wait(child("import time; time.sleep(1)", tmp_path))
    assert ended.cpu_seconds is not None
    assert ended.cpu_seconds < 0.5


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("print('error: the reason'); print('after'); raise SystemExit(1)", "the reason"),
        ("print('one'); print('two'); raise SystemExit(1)", "two"),
        ("raise SystemExit(4)", "no output, exit code 4"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9; out of memory?"),
    ],
)
def test_the_line_that_says_why(code: str, line: str, tmp_path: Path) -> None:
    assert wait(child(code, tmp_path)).last_error() == line


def test_stop_interrupts_all_and_waits_for_them(tmp_path: Path) -> None:
    polite = SLEEPER.replace(
        "time.sleep(60)",
        "\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved'); raise SystemExit(7)",
    )
    both = [child(polite, tmp_path, "a"), child(polite, tmp_path, "b")]
    for one in both:
        while "ready" not in one.log.read_text():
            time.sleep(0.01)
    stop(both)
    assert [one.code for one in both] == [7, 7]
    assert all("saved" in one.log.read_text() for one in both)


def test_a_child_that_will_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corolla.host.processes._GRACE", 0.2)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + SLEEPER
    one = child(deaf, tmp_path)
    while "ready" not in one.log.read_text():
        time.sleep(0.01)
    stop([one])
    assert one.code == -signal.SIGKILL


def test_ctrl_c_waits_for_the_end_of_what_must_be_whole() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("written")
        done.append("not reached")
    assert done == ["written"]
    with uninterrupted():
        done.append("undisturbed")
    assert done == ["written", "undisturbed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_what_must_be_whole_comes_first() -> None:
    with pytest.raises(OSError, match="disk"), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise OSError("disk")


def test_sigterm_is_ctrl_c_and_waits_as_well() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt(), uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        done.append("written")
    assert done == ["written"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_thread_has_no_signals() -> None:
    done = []

    def work() -> None:
        with terminate_as_interrupt(), uninterrupted():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]


def test_a_noted_process_is_found_again_but_never_another_with_its_id(tmp_path: Path) -> None:
    note = tmp_path / "child.json"
    with subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL) as child:
        note_process(note, child.pid)
        found = noted_process(note)
        assert found is not None
        assert found.pid == child.pid
        text = note.read_text()
        note.write_text(text.replace('"began": ', '"began": 1'))  # the id is used again
        assert noted_process(note) is None
        note.write_text(text)
        end(found, 20)
        child.wait(20)
    assert noted_process(note) is None
    for text in ("", "{}", "[]", '{"pid": "x"}'):
        note.write_text(text)
        assert noted_process(note) is None
    end(None, 1)


def test_what_cannot_be_read_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file left to open, a process that lives must not be started a second time."""
    note = tmp_path / "child.json"
    note_process(note, os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            noted_process(note)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = noted_process(note)
    assert found is not None
    assert found.pid == os.getpid()


def test_a_zombie_counts_as_ended(tmp_path: Path) -> None:
    """Flower's executor never waits for a ServerApp: it stays a zombie for as long as that runs."""
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as child:
        note_process(tmp_path / "child.json", child.pid)
        found = noted_process(tmp_path / "child.json")
        began = time.monotonic()
        end(found, 30)
        assert time.monotonic() - began < 10
        assert noted_process(tmp_path / "child.json") is None
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
