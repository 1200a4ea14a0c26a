"""Keys that come, change and cannot be read, while the SuperLink answers and while it is away."""

import errno
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from corolla.host import certificates
from corolla.server.deployment import members
from corolla.server.deployment.keys import ClientKeys
from tests.e2e.federation import make_key


class Registry:
    """In place of the SuperLink's list of keys; `away`: it does not answer."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.away = False

    def register(self, pem: bytes) -> bool:
        if self.away:
            raise httpx.ConnectError("away")
        self.keys.append(pem)
        return True


def test_keys_are_registered_once_when_they_come_and_again_when_they_change(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    made = ClientKeys(keys, said.append)
    registry: Any = Registry()
    make_key(tmp_path, "a", keys)
    (keys / "bad.pub").write_text("hello")
    (keys / "note.txt").write_text("not looked at")
    for _ in range(3):
        made.register(registry)
    assert registry.keys == [certificates.public_key(keys / "a.pub")]
    assert [line.split(":")[0] for line in said] == ["left out"]
    make_key(tmp_path, "b", keys)
    registry.away = True
    with pytest.raises(httpx.ConnectError):
        made.register(registry)
    registry.away = False
    made.register(registry)
    assert registry.keys[1:] == [certificates.public_key(keys / "b.pub")]


def test_a_folder_of_keys_that_cannot_be_listed_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    made = ClientKeys(keys, said.append)
    registry: Any = Registry()
    make_key(tmp_path, "a", keys)

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("glob", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, refuse)
            for _ in range(2):
                made.register(registry)
    assert len(said) == 2
    assert registry.keys == []
    made.register(registry)  # what could not be read then is not left out for good
    assert len(registry.keys) == 1


def test_a_member_that_was_removed_is_not_registered_and_this_is_said_with_what_to_do(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    make_key(tmp_path, "a", keys)
    members.admit_all(keys)
    members.remove(keys, "a")
    registry: Any = Registry()
    made = ClientKeys(keys, said.append)
    for _ in range(2):
        made.register(registry)
    assert registry.keys == []
    assert said == [f"left out: a was removed: corolla members {keys} --restore a lets it in again"]
    assert made.registered == set()
    members.restore(keys, "a")
    for _ in range(2):
        made.register(registry)
    assert registry.keys == [certificates.public_key(keys / "a.pub")]
    assert made.registered == {"a"}


def test_a_folder_that_cannot_be_written_is_said_and_keys_are_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    make_key(tmp_path, "a", keys)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(members, "write_atomic", refuse)
    registry: Any = Registry()
    ClientKeys(keys, said.append).register(registry)
    assert len(registry.keys) == 1
    assert "names are not bound to keys" in said[0]
