"""`corolla members`: it binds, shows, removes and restores, and refuses in one line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from tests.e2e.federation import key_folder


def run(*words: str, code: int = 0) -> str:
    """What the command prints; on stderr where it fails."""
    result = CliRunner().invoke(app, ["members", *words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return key_folder(tmp_path, "ada", "ben")


def test_members_are_bound_shown_removed_and_restored(keys: Path) -> None:
    shown = run(str(keys)).splitlines()
    found = json.loads((keys / "members.json").read_text())
    assert [line.split(",")[0] for line in shown] == [
        f"{own['name']}: key {own['key'][:16]}" for own in found
    ]
    assert "ben" in run(str(keys), "--remove", "ben")
    listed = json.loads(run(str(keys), "--json"))
    assert [own["removed"] is None for own in listed] == [True, False]
    assert "removed" not in run(str(keys), "--restore", "ben")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--remove", "eve"], "has no member 'eve' who takes part"),
        (["--restore", "ada"], "has no member 'ada' who was removed"),
    ],
)
def test_who_is_no_member_is_one_line(keys: Path, words: list[str], why: str) -> None:
    told = run(str(keys), *words, code=2)
    assert why in told
    assert len(told.splitlines()) == 1


def test_what_is_no_folder_of_keys_is_one_line(tmp_path: Path) -> None:
    assert "is no folder of keys" in run(str(tmp_path / "none"), code=2)
