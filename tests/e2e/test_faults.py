"""Servers that are killed or run out of disk: a resumed run ends in the very same adapter.

Each run is a process of its own, killed by SIGKILL at a named point of its second round.
"""

import json
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.forked import Commands

OPTIONS = (
    "--clients 3 --cohort 2 --rounds 2 --local-steps 1 --batch-size 2 --strategy flora "
    "--set threads=1 --set eval-examples=8 --set eval-client-examples=2 --set max-length=64"
)


@dataclass
class Runner:
    """Runs simulations in processes of their own."""

    commands: Commands
    folder: Path
    started: int = 0

    def __call__(self, *options: str, fail_at: str = "", limit: int = 0) -> tuple[int, str]:
        """(exit code, output); `limit` is how large a file may become, in bytes."""
        self.started += 1
        log = self.folder / f"{self.started}.log"
        run = self.commands.start(
            *("simulate", *options),
            folder=self.folder,
            environment={"COROLLA_FAIL_AT": fail_at},
            output=log,
            largest_file=limit,
        )
        return run.wait(), log.read_text()

    def whole(self, *options: str) -> None:
        """A run that must succeed."""
        code, output = self(*options)
        assert code == 0, output


@pytest.fixture(scope="module")
def run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(commands, tmp_path_factory.mktemp("logs"))


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def states(folder: Path) -> dict[int, str]:
    """Round → sha256 of what was committed; the same each time a round was."""
    found: dict[int, str] = {}
    for entry in entries(folder):
        if entry["event"] == "committed":
            assert found.setdefault(entry["round"], entry["state"]) == entry["state"]
    return found


def rounds(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["round"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run.whole(*OPTIONS.split(), "--out", str(folder))
    return folder


@pytest.mark.parametrize(
    ("point", "kept", "again"),
    [
        ("planned:1", 0, 0),
        ("planned:2", 1, 0),
        ("waiting:2", 1, 0),
        ("aggregated:2", 1, 0),
        ("checkpointed:2", 1, 1),
        ("committed:2", 2, 0),
    ],
)
def test_a_killed_server_resumes_to_the_same_bits(
    point: str, kept: int, again: int, run: Runner, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed before it sends, while it waits, before and after it commits.

    `kept` is the last committed round; a round whose checkpoint was written but not committed is
    repeated (`again`), and never more than one.
    """
    folder = tmp_path / "run"
    code, output = run(*OPTIONS.split(), "--out", str(folder), fail_at=point)
    assert code == -signal.SIGKILL, output
    assert max(states(folder), default=0) == kept
    saved = len(list((folder / "checkpoint").glob("*.json"))) if kept else 0
    assert saved == kept + again
    run.whole("--resume", "--out", str(folder))
    assert facts(folder)["adapter_sha256"] == facts(undisturbed)["adapter_sha256"]
    assert states(folder) == states(undisturbed)
    assert rounds(folder) == [1, 2]
    commits = Counter(e["round"] for e in entries(folder) if e["event"] == "committed")
    assert commits == {1: 1, 2: 1}
    plans = Counter(e["round"] for e in entries(folder) if e["event"] == "planned")
    assert plans == {1: 1, 2: 1}, "the journalled cohort is asked again"
    assert [e["event"] for e in entries(folder)].count("resumed") == 1


def test_a_full_disk_keeps_the_round_before(run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    """The second checkpoint is larger than what fits."""
    first = undisturbed / "checkpoint" / "round-000001.safetensors"
    second = undisturbed / "checkpoint" / "round-000002.safetensors"
    assert second.stat().st_size > first.stat().st_size
    folder = tmp_path / "run"
    code, output = run(*OPTIONS.split(), "--out", str(folder), limit=second.stat().st_size - 1)
    assert code == 1
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert "round 2 could not be kept" in line
    assert "go on with --resume" in line
    assert "Traceback" not in output
    assert max(states(folder)) == 1
    assert entries(folder)[-1]["event"] == "failed"
    run.whole("--resume", "--out", str(folder))
    assert facts(folder)["adapter_sha256"] == facts(undisturbed)["adapter_sha256"]
    assert states(folder) == states(undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_costs_one_round(
    damage: str, run: Runner, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    path = folder / "checkpoint" / "round-000002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    run.whole("--resume", "--out", str(folder))
    assert facts(folder)["adapter_sha256"] == facts(undisturbed)["adapter_sha256"]
    assert states(folder) == states(undisturbed)
    assert rounds(folder) == [1, 2]
    assert [e["round"] for e in entries(folder) if e["event"] == "committed"] == [1, 2, 2]
    (again,) = [e for e in entries(folder) if e["event"] == "resumed"]
    assert again["round"] == 1


def test_a_damaged_journal_is_one_clear_line(
    run: Runner, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    code, output = run("--resume", "--out", str(folder))
    assert code == 1
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert "journal.jsonl is damaged in line 3 of" in line
    path.write_bytes(b"".join(lines) + lines[-1][:25])  # torn, as by a power failure
    run.whole("--resume", "--out", str(folder))
    assert facts(folder)["adapter_sha256"] == facts(undisturbed)["adapter_sha256"]
