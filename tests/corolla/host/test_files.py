"""Temporary folders: whose are deleted when, whatever ended their processes."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from corolla.host.files import scratch_folder

KILLED = """
import os, signal
from corolla.host.files import scratch_folder
with scratch_folder("test") as folder:
    (folder / "big").touch()
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_what_a_killed_process_has_left_is_deleted_at_the_next_start() -> None:
    said = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, timeout=120
    )
    left = Path(said.stdout.strip())
    assert (left / "big").exists()
    with scratch_folder("other"):
        assert left.exists()
    with scratch_folder("test") as folder:
        assert not left.exists()
        assert folder.is_dir()
    assert not folder.exists()


def test_what_is_in_use_stays() -> None:
    with scratch_folder("test") as first, scratch_folder("test") as second:
        (first / "mine").touch()
        assert first != second
        with scratch_folder("test"):
            assert (first / "mine").exists()
            assert second.exists()


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "corolla-test-mine").mkdir()
    with scratch_folder("test"):
        pass
    assert (tmp_path / "corolla-test-mine").exists()
