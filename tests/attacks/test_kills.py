"""A run that is killed again and again, wherever its journal has got to, ends in the same bits."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from corolla.server.runs.journal import read
from tests.e2e.forked import Command, Commands

pytestmark = pytest.mark.command

ARGUMENTS = (
    "simulate --strategy fedavg --rounds 5 --clients 4 --cohort 2 --local-steps 2 --batch-size 2 "
    "--set threads=1 --set eval-examples=4 --set eval-clients=0"
)
KILLS = 4
STEP = 5
"""Lines of the journal between two kills: they fall on other events of a round each time."""


def started(commands: Commands, folder: Path, out: Path) -> Command:
    """A run that begins, or goes on where it was killed."""
    resumed = ["simulate", "--resume"] if (out / "run.json").is_file() else ARGUMENTS.split()
    return commands.start(
        *(*resumed, "--out", str(out)),
        folder=folder,
        output=folder / "output",
        errors=folder / "errors",
    )


def lines(out: Path) -> int:
    return len(read(out)) if (out / "journal.jsonl").is_file() else 0


def test_kills_at_lines_of_the_journal_change_no_bit(commands: Commands, tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    whole = started(commands, tmp_path, plain)
    assert whole.wait() == 0, (tmp_path / "errors").read_text()
    kills, deadline = 0, time.monotonic() + 600
    while True:
        process = started(commands, tmp_path, killed)
        least = lines(killed) + STEP
        if kills < KILLS:
            while lines(killed) < least and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        code = process.wait()
        if code != -signal.SIGKILL:
            break
    assert code == 0, (tmp_path / "errors").read_text()
    assert kills == KILLS
    first, last = (json.loads((out / "run.json").read_text()) for out in (plain, killed))
    assert last["adapter_sha256"] == first["adapter_sha256"]
    assert last["state_sha256"] == first["state_sha256"]
