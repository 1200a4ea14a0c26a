"""The file of members: names bound to keys, kept whole, for its owner alone."""

import json
from pathlib import Path

import pytest

from corolla.errors import ConfigError
from corolla.host import certificates
from corolla.server.deployment import members
from tests.e2e.federation import key_folder, make_key


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return key_folder(tmp_path, "ada", "ben")


def pem(keys: Path, name: str) -> bytes:
    return certificates.public_key(keys / f"{name}.pub")


def test_names_of_key_files_are_bound_once_and_the_file_is_its_owners(keys: Path) -> None:
    found = members.admit_all(keys)
    assert [own.name for own in found] == ["ada", "ben"]
    assert [own.key for own in found] == [members.digest(pem(keys, n)) for n in ("ada", "ben")]
    path = keys / members.FILE
    assert path.stat().st_mode & 0o777 == 0o600
    entries = json.loads(path.read_text())
    assert entries[0].keys() == {"name", "key", "since", "removed"}
    before = path.read_bytes()
    assert members.admit_all(keys) == found
    assert path.read_bytes() == before


def test_a_new_key_under_a_name_takes_the_place_of_the_old_one(keys: Path, tmp_path: Path) -> None:
    members.admit_all(keys)
    old = pem(keys, "ada")
    make_key(tmp_path, "ada", keys)
    members.admit_all(keys)
    roll = members.Roll(keys)
    assert roll.changed()
    assert not roll.changed()
    assert roll.refuse("ada", old) == "its key was removed by the owner of the server"
    assert roll.refuse("else", old) == "its key was removed by the owner of the server"
    assert roll.refuse("ada", pem(keys, "ada")) == ""
    assert roll.binds("ada", pem(keys, "ada"))


def test_a_removed_member_stays_out_until_it_is_let_in_again(keys: Path) -> None:
    members.admit_all(keys)
    assert members.remove(keys, "ben").removed is not None
    assert not members.admit(keys, "ben", pem(keys, "ben"))
    roll = members.Roll(keys)
    roll.changed()
    assert roll.refuse("ben", pem(keys, "ben"))
    with pytest.raises(ConfigError, match="no member 'ben' who takes part"):
        members.remove(keys, "ben")
    with pytest.raises(ConfigError, match="no member 'ada' who was removed"):
        members.restore(keys, "ada")
    members.restore(keys, "ben")
    assert roll.changed()
    assert roll.refuse("ben", pem(keys, "ben")) == ""
    assert members.admit(keys, "ben", pem(keys, "ben"))


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": "ada"}]'])
def test_a_damaged_file_is_one_line_and_changes_nothing_for_who_reads(
    keys: Path, text: str
) -> None:
    members.admit_all(keys)
    members.remove(keys, "ben")
    roll = members.Roll(keys)
    roll.changed()
    (keys / members.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"members\.json cannot be read"):
        members.read(keys)
    assert not roll.changed()
    assert roll.refuse("ben", pem(keys, "ben"))


def test_while_the_file_is_away_those_who_were_removed_stay_out(keys: Path) -> None:
    members.admit_all(keys)
    members.remove(keys, "ben")
    roll, text = members.Roll(keys), (keys / members.FILE).read_bytes()
    roll.changed()
    for _ in range(2):
        (keys / members.FILE).unlink()
        assert not roll.changed()
        assert roll.refuse("ben", pem(keys, "ben"))
        assert roll.refuse("ada", b"another key")
        (keys / members.FILE).write_bytes(text)
        assert roll.changed()
    members.restore(keys, "ben")
    assert roll.changed()
    assert roll.refuse("ben", pem(keys, "ben")) == ""


def test_a_server_that_goes_on_without_the_file_is_refused_and_told_what_to_do(
    keys: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"members\.json is gone.*corolla members "):
        members.check_there(keys)
    members.admit_all(keys)
    members.check_there(keys)


def test_without_a_folder_everybody_has_any_name() -> None:
    roll = members.Roll(None)
    assert not roll.changed()
    assert roll.refuse("ada", b"key") == ""
    assert not roll.binds("ada", b"key")
