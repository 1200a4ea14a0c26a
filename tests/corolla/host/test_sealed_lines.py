"""The file format; what a journal makes of it is tested in tests/server/runs/test_journal.py."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from corolla.errors import ArtefactError, ConfigError
from corolla.host import sealed_lines
from corolla.host.sealed_lines import Chained

ENTRIES: list[dict[str, Any]] = [
    {"a": 1, "text": 'é "quoted"\n'},
    {"b": [0.1, None, True]},
    {},
    {"c": {"d": 1e-300}},
]


def opened(path: Path) -> Chained:
    return Chained(path, "busy here", "mend it")


def written(path: Path) -> bytes:
    with opened(path) as file:
        for entry in ENTRIES:
            file.append(entry)
    return path.read_bytes()


def test_what_is_appended_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    whole = written(path)
    assert sealed_lines.read(path, "").entries == ENTRIES
    with opened(path) as file:
        assert (file.content.entries, file.content.end) == (ENTRIES, len(whole))
        file.append({"e": 1})
    assert path.read_bytes().startswith(whole)
    assert sealed_lines.read(path, "").entries == [*ENTRIES, {"e": 1}]


def test_each_line_is_one_json_object_sealed_over_all_before_it(tmp_path: Path) -> None:
    before = ""
    lines = written(tmp_path / "file.jsonl").decode().splitlines()
    assert len(lines) == len(ENTRIES)
    for line, entry in zip(lines[:2], ENTRIES, strict=False):
        body, _, own = line.partition(', "sha256": "')
        before = hashlib.sha256((before + body).encode()).hexdigest()
        assert own == before + '"}'
        assert json.loads(line) == {**entry, "sha256": before}


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert sealed_lines.read(tmp_path / "none", "") == sealed_lines.Content([], b"", "", 0)
    assert not (tmp_path / "none").exists()


def test_a_torn_last_line_is_given_back_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    whole = written(path)
    at = whole.rindex(b"\n", 0, -1) + 1
    for length in range(at, len(whole)):
        path.write_bytes(whole[:length])
        found = sealed_lines.read(path, "")
        assert (found.entries, found.torn, found.end) == (ENTRIES[:3], whole[at:length], at)
    with opened(path) as file:
        file.append(ENTRIES[3])
    assert path.read_bytes() == whole


def test_a_torn_line_says_what_is_left_of_it(tmp_path: Path) -> None:
    """All of its facts, or nothing: never a part of them."""
    whole = written(tmp_path / "file.jsonl")
    line = whole[whole.rindex(b"\n", 0, -1) + 1 :]
    body = line.index(b', "sha256"')
    for length in range(len(line)):
        expected = ENTRIES[3] if length >= body + len(b', "sha256": "') else None
        assert sealed_lines.facts(line[:length]) == expected, length
    assert sealed_lines.facts(b"\0" * 40) is None
    assert sealed_lines.facts(b"7") is None
    assert sealed_lines.facts(b"\xff{") is None


def test_damage_before_the_end_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    whole = written(path)
    path.write_bytes(whole.replace(b"0.1", b"0.2"))
    for attempt in (lambda: sealed_lines.read(path, "mend it"), lambda: opened(path)):
        with pytest.raises(ArtefactError) as caught:
            attempt()
        assert str(caught.value) == f"{path} is damaged in line 2 of 4: mend it"
    with path.open("r+b"):  # nothing holds it: the lock went with the error
        assert sealed_lines.alive(path) is False


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    with opened(path):
        assert sealed_lines.alive(path) is True
        with pytest.raises(ConfigError, match=r"^another process is busy here$"):
            opened(path)
    assert sealed_lines.alive(path) is False
    with opened(path):
        pass


def test_a_line_and_a_new_name_are_on_disk_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.jsonl"
    synced: list[bytes | str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder" if folder else path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    with opened(path) as file:
        assert synced == ["folder"]
        file.append({"a": 1})
        assert synced == ["folder", path.read_bytes()]
    assert path.read_bytes().endswith(b"\n")


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot be written"):
        opened(tmp_path / "none" / "file.jsonl")
    with pytest.raises(ArtefactError, match="cannot be read"):
        sealed_lines.read(tmp_path, "")


def test_lines_lost_from_the_end_leave_no_trace(tmp_path: Path) -> None:
    """What the format does not promise: whoever needs it must keep the newest copy."""
    path = tmp_path / "file.jsonl"
    lines = written(path).splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        assert sealed_lines.read(path, "").entries == ENTRIES[:kept]
