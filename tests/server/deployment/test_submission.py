"""A run that Flower executes: how its ServerApp ends, and when it is submitted again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from corolla.errors import ConfigError, RoundError
from corolla.server import app
from corolla.server.deployment import submission
from corolla.server.deployment.order import OUTCOME, PROCESS, Outcome
from corolla.server.deployment.submission import Submission


@dataclass
class Control:
    """In place of the SuperLink, which says the same of every run."""

    says: str

    def submit(self) -> int:
        return 1

    def stop_others(self) -> None: ...

    def status(self, run: int) -> tuple[str, str]:
        return self.says, ""


def test_what_a_serverapp_says_ends_the_server_or_not(tmp_path: Path) -> None:
    (tmp_path / "flower").mkdir()
    made = Submission(tmp_path, print)
    assert not made.ended()
    Outcome("stopped", "by whoever", 1).write(tmp_path)
    assert not made.ended()
    Outcome("done").write(tmp_path)
    assert made.ended()
    Outcome("failed", "wrong", 2).write(tmp_path)
    with pytest.raises(ConfigError, match="wrong"):
        made.ended()
    Outcome("failed", "too few", 1).write(tmp_path)
    with pytest.raises(RoundError, match="too few"):
        made.ended()


def test_on_a_full_disk_the_one_line_of_the_serverapp_is_what_ends_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "flower").mkdir()
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "superexec.log"
    log.write_text("corolla failed: of an earlier one\n")
    made = Submission(tmp_path, print)
    control: Any = Control("running")
    made.begin(control)
    assert made._last_words() == ""
    (tmp_path / OUTCOME).with_name(OUTCOME.name + ".part").symlink_to("/dev/full")
    app._leave(Outcome("failed", "the disk\nis full", 1), tmp_path)
    said = capsys.readouterr().err
    with log.open("a") as file:
        file.write(said + "Flower's own words\n")
    (tmp_path / PROCESS).write_text("{}")  # it was there, and is no more
    with pytest.raises(RoundError, match=r"^the disk is full"):
        made.given_up(control)


def test_a_serverapp_that_never_begins_is_given_up(tmp_path: Path) -> None:
    now = [1000.0]
    control: Any = Control("pending")
    made = Submission(tmp_path, print, lambda: now[0])
    assert made.given_up(control) == ""  # it is not even submitted
    made.begin(control)
    now[0] += submission._BEGIN
    assert made.given_up(control) == ""
    now[0] += 1
    assert made.given_up(control) == "its ServerApp has not begun in 180 s"


def test_a_run_that_fails_without_a_round_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    made = Submission(tmp_path, said.append)
    control: Any = Control("running")
    tries = 0
    with pytest.raises(RoundError, match="failed 5 times without a round: boom"):
        while tries < 10:
            made.again(control, "boom")
            tries += 1
    assert tries == submission._TRIES - 1
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "round-000003.json").write_text("")
    made.again(control, "boom")  # it has brought a round: counted anew
    assert said[-1] == "the run goes on from round 3: boom"
