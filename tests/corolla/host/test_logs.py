import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from corolla.errors import ConfigError
from corolla.host import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    logs.unconfigure()


def read(text: str) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_says_when_what_and_about_whom() -> None:
    stream = io.StringIO()
    logs.configure(stream, "the run")
    with logs.bind(round=3), logs.bind(client="ada"):
        logs.logger("server").info("replied", bytes=12)
    logs.logger("server").warning("alone")
    first, second = read(stream.getvalue())
    when = datetime.fromisoformat(first.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert first == {
        **{"level": "info", "logger": "server", "event": "replied", "run": "the run"},
        **{"round": 3, "client": "ada", "bytes": 12},
    }
    assert (second["level"], second["round"], second["client"]) == ("warning", None, None)


def test_a_bound_run_comes_before_the_configured_one() -> None:
    stream = io.StringIO()
    logs.configure(stream, "usual")
    with logs.bind(run="another"):
        logs.logger("daemon").info("began")
    logs.logger("daemon").info("ended", run="third")
    assert [line["run"] for line in read(stream.getvalue())] == ["another", "third"]


def test_each_thread_has_its_own_facts() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    both_bound = threading.Barrier(2)

    def work(name: str) -> None:
        with logs.bind(client=name):
            both_bound.wait(60)
            logs.logger("gateway").info(f"from {name}")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ada", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(line["client"], line["event"]) for line in read(stream.getvalue())} == {
        ("ada", "from ada"),
        ("ben", "from ben"),
    }


def test_one_event_is_one_line_of_json_whatever_it_holds() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    logs.logger("server").error("two\nlines\u2028three %s", loss=float("nan"), why=Path("/x"))
    logs.logger("server").info("nested", scores={"loss": [float("inf"), 1.0]})
    first, second = read(stream.getvalue())
    assert first["event"] == "two\nlines\u2028three %s"
    assert (first["loss"], first["why"]) == ("nan", "/x")
    assert second["scores"] == {"loss": ["inf", 1.0]}


def test_a_fact_cannot_pose_as_another_level_or_time() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    logs.logger("server").warning("odd", time="never", level="info")
    (line,) = read(stream.getvalue())
    assert line["level"] == "warning"
    assert line["time"] != "never"


def test_nothing_is_written_before_it_is_configured(capfd: pytest.CaptureFixture[str]) -> None:
    logs.logger("server").error("unheard")
    assert capfd.readouterr() == ("", "")


def test_a_file_is_appended_to_and_may_be_cut_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logs.configure(path)
    logs.logger("server").info("one")
    logs.configure(path)
    logs.logger("server").info("two")
    assert [line["event"] for line in read(path.read_text())] == ["one", "two"]
    path.write_text("")
    logs.logger("server").info("three")
    assert [line["event"] for line in read(path.read_text())] == ["three"]


def test_debug_is_left_out_unless_asked_for() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    logs.logger("server").debug("small")
    assert stream.getvalue() == ""


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the log"):
        logs.configure(tmp_path / "none" / "log.jsonl")


def test_a_full_disk_loses_lines_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    logs.configure(Path("/dev/full"))
    logs.logger("server").error("lost")
    assert capfd.readouterr() == ("", "")


def test_a_file_keeps_a_limited_end_for_two_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's supervisor and trainer share one file: neither writes on to a moved one."""
    monkeypatch.setattr(logs, "_MOST", 2000)
    path = tmp_path / "log.jsonl"
    logs.configure(path)
    other = logs._File(path)
    try:
        for number in range(100):
            logs.logger("one").info("event", number=number)
            other.emit(logging.makeLogRecord({"msg": f"other {number}"}))
        last = "".join(found.read_text() for found in tmp_path.iterdir())
    finally:
        logs.unconfigure()
        other.close()
    assert '"number": 99' in last
    assert "other 99" in last
    files = sorted(found.name for found in tmp_path.iterdir())
    assert files in (["log.jsonl", "log.jsonl.1"], ["log.jsonl.1"])
    assert all(found.stat().st_size < 2500 for found in tmp_path.iterdir())
