"""Which folders a run takes, and what is said of one that is damaged."""

import json
from pathlib import Path

import pytest

from corolla.errors import ArtefactError, ConfigError
from corolla.server.runs.folder import prepare_folder, stored_run, stored_warnings


def test_folders_are_prepared(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new" / "deep", resume=False)
    assert (tmp_path / "new" / "deep").is_dir()
    assert (tmp_path / "new" / "deep").stat().st_mode & 0o777 == 0o700
    prepare_folder(tmp_path / "new" / "deep", resume=False)  # empty is as good as new


def test_a_run_that_was_killed_before_run_json_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("{}\n")
    (tmp_path / "run.json.part").write_text("{")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        prepare_folder(tmp_path, resume=False)
    (tmp_path / "mine.txt").unlink()
    prepare_folder(tmp_path, resume=False)
    assert not (tmp_path / "journal.jsonl").exists()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for name, resume, reason in (
        ("file", False, "is a file"),
        ("file", True, "is a file"),
        ("full", False, "not empty"),
        ("full", True, "no run.json"),
        ("none", True, "no run.json"),
        ("file/below", False, "cannot make|is a file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            prepare_folder(tmp_path / name, resume=resume)
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "full" / "mine.txt").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"config": {}}', '{"run_id": 1}']
)
def test_a_damaged_note_of_a_run_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtefactError, match="cannot be read"):
        stored_run(tmp_path)


def test_warnings_of_a_run_are_read_from_its_folder(tmp_path: Path) -> None:
    """A server tells them; where the file cannot be read it has told worse already."""
    assert stored_warnings(tmp_path) == []
    told = [{"id": "worse", "text": "worse: lower lr", "numbers": {}}]
    (tmp_path / "run.json").write_text(json.dumps({"warnings": told}))
    assert stored_warnings(tmp_path) == ["worse: lower lr"]
    (tmp_path / "run.json").write_text("[")
    assert stored_warnings(tmp_path) == []
