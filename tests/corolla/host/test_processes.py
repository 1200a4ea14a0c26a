import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from corolla.host.processes import (
    bypass_proxies,
    end,
    free_port,
    named_proxies,
    note_process,
    noted_process,
    stoppable,
    terminate_as_interrupt,
    uninterrupted,
)

SLEEP = [sys.executable, "-S", "-c", "print('up', flush=True); import time; time.sleep(60)"]


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


@pytest.fixture
def ignored() -> Iterator[None]:
    """Ctrl-C and the end of the terminal are ignored, as in a script's background under nohup."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("ignored")
def test_what_was_ignored_at_the_start_stays_so() -> None:
    with stoppable() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert not asked.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()
    with terminate_as_interrupt(), uninterrupted():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("ignored")
def test_sigterm_ends_a_run_also_where_ctrl_c_is_ignored() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append("written")
        signal.raise_signal(signal.SIGTERM)
        done.append("not reached")
    assert done == ["written"]


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
        end(found, 60)
        child.wait(60)
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
        end(found, 120)
        assert time.monotonic() - began < 60
        assert noted_process(tmp_path / "child.json") is None
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without any; what a test sets is gone at its end."""
    for name in PROXIES:
        for own in (name, name.upper()):
            monkeypatch.setenv(own, "")
            monkeypatch.delenv(own)


class Quiet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *told: object) -> None: ...


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_calls_on_loopback_go_past_a_dead_proxy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also those of a child, which inherits the environment."""
    monkeypatch.setenv(name, f"http://{'user:secret@'}127.0.0.1:{free_port()}")
    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        bypass_proxies()
        assert httpx.get(url).status_code == 204
        code = "import sys, httpx; print(httpx.get(sys.argv[1]).status_code)"
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, check=True)
        server.shutdown()
    assert done.stdout == b"204\n"
    assert f"{name}=127.0.0.1:" in named_proxies()
    assert "secret" not in named_proxies()


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("", "127.0.0.1,localhost,::1"),
        ("example.org, localhost", "example.org,localhost,127.0.0.1,::1"),
        ("*", "*,127.0.0.1,localhost,::1"),
    ],
)
def test_other_hosts_that_go_past_proxies_still_do(
    monkeypatch: pytest.MonkeyPatch, told: str, wanted: str
) -> None:
    monkeypatch.setenv("NO_PROXY", told)
    for _ in range(2):
        bypass_proxies()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == wanted
    assert named_proxies() == ""
