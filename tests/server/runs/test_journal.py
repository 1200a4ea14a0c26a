import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from corolla.errors import ArtefactError, ConfigError
from corolla.server.runs.journal import NAME, Journal, alive, past, read


def written(folder: Path) -> bytes:
    """A journal of four lines; returns its bytes."""
    with Journal(folder) as found:
        found.append("started", roster={"ada": 4, "ben": 7}, round=0, state="")
        found.append("planned", round=1, attempt=0, cohort={"ada": 1}, seed=3)
        found.append("verdicts", round=1, attempt=0, verdicts={"ada": "accepted"}, why={})
        found.append("committed", round=1, state="ab" * 32)
    return (folder / NAME).read_bytes()


def events(folder: Path) -> list[str]:
    return [entry["event"] for entry in read(folder)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    entries = read(tmp_path)
    assert [entry["event"] for entry in entries] == ["started", "planned", "verdicts", "committed"]
    assert entries[1]["cohort"] == {"ada": 1}
    assert [entry["seconds"] for entry in entries] == sorted(e["seconds"] for e in entries)
    assert all(entry["time"].endswith("Z") and "sha256" not in entry for entry in entries)


def test_each_line_seals_the_lines_before_it(tmp_path: Path) -> None:
    """By hand: the checksum is over the one before and the line up to its own."""
    before = ""
    for line in written(tmp_path).decode().splitlines():
        body, _, own = line.partition(', "sha256": "')
        before = hashlib.sha256((before + body).encode()).hexdigest()
        assert own == before + '"}'
        assert json.loads(line)["sha256"] == before


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    assert past([]).committed is None


def test_any_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole = written(tmp_path)
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start, len(whole)):
        (tmp_path / NAME).write_bytes(whole[:length])
        assert events(tmp_path) == ["started", "planned", "verdicts"], length


def test_zeros_where_the_last_line_should_be_are_dropped(tmp_path: Path) -> None:
    """What a file system may leave after a power failure."""
    whole = written(tmp_path)
    (tmp_path / NAME).write_bytes(whole + b"\0" * 100)
    assert events(tmp_path) == ["started", "planned", "verdicts", "committed"]


def test_a_torn_line_is_noted_and_written_over(tmp_path: Path) -> None:
    whole = written(tmp_path)
    (tmp_path / NAME).write_bytes(whole + b'{"event": "pri')
    with Journal(tmp_path) as found:
        assert "the last line" in found.note
        assert "torn: dropped" in found.note
        found.append("stopped", why="x")
    assert (tmp_path / NAME).read_bytes().startswith(whole)
    assert events(tmp_path)[-2:] == ["committed", "stopped"]
    with Journal(tmp_path) as again:
        assert again.note == ""


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """But where it looks like a torn line: without an end, or with a zero in it."""
    whole = written(tmp_path)
    missed = []
    for bit in range(0, 8 * (len(whole) - 1), 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / NAME).write_bytes(damaged)
        try:
            read(tmp_path)
            missed += [bit] if 0 not in damaged else []
        except ArtefactError as error:
            assert "journal.jsonl is damaged in line" in str(error)
    assert missed == []


@pytest.mark.parametrize("change", ["lost", "moved", "twice"])
def test_lines_that_are_lost_moved_or_doubled_are_found(tmp_path: Path, change: str) -> None:
    lines = written(tmp_path).splitlines(keepends=True)
    changed = {
        "lost": [lines[0], *lines[2:]],
        "moved": [lines[0], lines[2], lines[1], lines[3]],
        "twice": [*lines[:2], *lines[1:]],
    }[change]
    (tmp_path / NAME).write_bytes(b"".join(changed))
    with pytest.raises(ArtefactError, match=r"damaged in line [23] of"):
        Journal(tmp_path)


def test_a_journal_goes_on_in_another_process(tmp_path: Path) -> None:
    whole = written(tmp_path)
    with Journal(tmp_path) as found:
        assert found.past.roster == {"ada": 4, "ben": 7}
        assert found.seconds >= read(tmp_path)[-1]["seconds"]
        found.append("resumed", roster={"cyd": 1}, round=1, state="ab" * 32)
    assert (tmp_path / NAME).read_bytes().startswith(whole)
    assert len(read(tmp_path)) == 5


def test_seconds_go_on_where_the_last_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time without a process does not count, nor does the clock on the wall."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Journal(tmp_path) as found:
        clock[0] += 5
        found.append("started", round=0, state="")
    clock[0] = 7.0  # the machine was started again
    with Journal(tmp_path) as found:
        clock[0] += 2
        assert found.seconds == 7.0


def test_what_is_appended_is_on_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    real = os.fsync
    with Journal(tmp_path) as found:

        def fsync(descriptor: int) -> None:
            real(descriptor)
            synced.append((tmp_path / NAME).read_bytes())

        monkeypatch.setattr(os, "fsync", fsync)
        found.append("planned", round=1, attempt=0)
    assert len(synced) == 1
    assert b'"planned"' in synced[0]


def test_a_line_that_cannot_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path) as found:
        found.append("started", round=0, state="")

        def fail(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(ArtefactError, match="Input/output"):
                found.append("planned", round=1, attempt=0)
        found.append("failed", why="disk")
    assert events(tmp_path) == ["started", "failed"]


def test_a_line_that_was_interrupted_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the line and the note of it; what it announces is not done then."""
    with Journal(tmp_path) as found:
        found.append("started", round=0, state="")

        def interrupt(descriptor: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                found.append("planned", round=1, attempt=0)
        found.append("stopped", why="Ctrl-C")
    assert events(tmp_path) == ["started", "stopped"]


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Journal(tmp_path) as found:
        found.append("started", round=0, state="")
        size = (tmp_path / NAME).stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))
            with pytest.raises(ArtefactError, match=r"space|too large"):
                found.append("planned", round=1, attempt=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        assert events(tmp_path) == ["started"]
        found.append("failed", why="disk")
    assert events(tmp_path) == ["started", "failed"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_not_written(tmp_path: Path, value: float) -> None:
    with Journal(tmp_path) as found, pytest.raises(ValueError, match="JSON"):
        found.append("privacy", round=1, epsilon=value)
    assert read(tmp_path) == []


def test_names_of_any_kind_stay_one_line(tmp_path: Path) -> None:
    names = {"a\nb": 1, "\u2028": 2, "\r": 3, "日本": 4, '"}': 5, ', "sha256": "': 6}
    with Journal(tmp_path) as found:
        found.append("started", roster=names, round=0, state="")
        found.append("stopped", why="x")
    assert read(tmp_path)[0]["roster"] == names


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(ConfigError, match="another process is running in"):
        Journal(tmp_path)
    with Journal(tmp_path):
        pass


def test_who_looks_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    import fcntl
    import threading

    written(tmp_path)
    with (tmp_path / NAME).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with Journal(tmp_path):
            pass
        timer.join()


def test_a_journal_tells_whether_its_process_lives(tmp_path: Path) -> None:
    assert alive(tmp_path) is None
    with Journal(tmp_path):
        assert alive(tmp_path) is True
    assert alive(tmp_path) is False


def test_a_killed_process_is_not_alive(tmp_path: Path) -> None:
    code = """
import sys
import time
from pathlib import Path
from corolla.server.runs.journal import Journal, fail_point
with Journal(Path(sys.argv[1])) as found:
    found.append("started", round=0, state="")
    fail_point("planned", 1)
    fail_point("planned", 2)
    print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "COROLLA_FAIL_AT": "planned:2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert alive(tmp_path) is False
    assert events(tmp_path) == ["started"]


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(ArtefactError, match="cannot be read"):
        read(tmp_path)


def entry(event: str, **facts: Any) -> dict[str, Any]:
    return {"event": event, "time": "", "seconds": 0.0, **facts}


def test_the_past_of_a_run() -> None:
    found = past(
        [
            entry("started", roster={"ben": 2, "ada": 1}, round=0, state=""),
            entry("planned", round=1, attempt=0, cohort={"ada": 1}),
            entry("committed", round=1, state="one"),
            entry("joined", roster={"aaa": 9}),
            entry("planned", round=2, attempt=0, cohort={"ben": 1}),
            entry("abandoned", round=2, attempt=0, why="nobody"),
            entry("planned", round=2, attempt=1, cohort={"aaa": 1}),
        ]
    )
    assert list(found.roster.items()) == [("ben", 2), ("ada", 1), ("aaa", 9)]
    assert (found.committed, found.round) == ({1: "one"}, 1)
    again = found.plan(2)
    assert again is not None
    assert (again["attempt"], again["cohort"]) == (1, {"aaa": 1})
    assert found.attempt(2) == 1
    assert found.plan(3) is None
    assert found.attempt(3) == 0


def test_an_abandoned_plan_is_not_carried_out_again() -> None:
    found = past(
        [
            entry("planned", round=1, attempt=0, cohort={"ada": 1}),
            entry("abandoned", round=1, attempt=0, why="nobody"),
        ]
    )
    assert found.plan(1) is None
    assert found.attempt(1) == 1


def test_a_run_that_was_resumed_without_a_journal_knows_its_round() -> None:
    found = past([entry("resumed", roster={}, round=5, state="five")])
    assert found.committed == {5: "five"}
