"""Members of a federation: names that are bound to keys, in one file beside the registered keys.

The stem of a key's file (NAME.pub) says whose it is. Another key does not get that name, and a
member who was removed takes part in nothing any more. A file that is deleted removes nobody: a
folder that is away for a moment must not lock out all.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from corolla.errors import ConfigError
from corolla.host import certificates, logs
from corolla.host.files import write_atomic, written

FILE = "members.json"

_log = logs.logger("members")


@dataclass(frozen=True)
class Member:
    """One key under one name."""

    name: str
    key: str
    """sha256 of the key in PEM, 64 hexadecimal characters; logs show the first 16."""
    since: str
    """The time of its first look, in UTC."""
    removed: str | None = None
    """The time of its removal; None: it takes part."""


def digest(public_key: bytes) -> str:
    """Returns the sha256 by which the file names a key, given in PEM."""
    return sha256(public_key.strip()).hexdigest()


def read(folder: Path) -> list[Member]:
    """The members of a folder of keys; none where there is no file. Raises ConfigError."""
    path = folder / FILE
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [Member(**entry) for entry in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; mend it, or restore a copy") from error


def check_there(folder: Path) -> None:
    """Raises ConfigError where a server that goes on would have no file, as it had before.

    Whoever was removed could join again. A folder that nobody may write in never had one.
    """
    if not (folder / FILE).exists() and os.access(folder, os.W_OK):
        raise ConfigError(
            f"{folder / FILE} is gone, which names those who were removed: put a copy back, or "
            f"begin a new one with corolla members {folder}"
        )


def admit(folder: Path, name: str, public_key: bytes) -> bool:
    """Bind a name to a key; False for a member who was removed.

    A key that takes the place of another, as after a device was set up anew, removes that one.
    Raises ConfigError, and OSError for a folder that cannot be written.
    """
    key, now = digest(public_key), _now()
    with _alone(folder):
        members = read(folder)
        same = [own for own in members if (own.name, own.key) == (name, key)]
        if not same:
            others = [_removed(own, now) if own.name == name else own for own in members]
            _write(folder, [*others, Member(name, key, now)])
        return not same or same[-1].removed is None


def remove(folder: Path, name: str) -> Member:
    """Keep a member out from now on. Raises ConfigError where there is none of that name."""
    with _alone(folder):
        members = read(folder)
        found = [own for own in members if own.name == name and own.removed is None]
        if not found:
            raise ConfigError(f"{folder / FILE} has no member {name!r} who takes part")
        now = _now()
        _write(folder, [_removed(own, now) if own in found else own for own in members])
        return _removed(found[-1], now)


def restore(folder: Path, name: str) -> Member:
    """Let the last key of a name that was removed in again. Raises ConfigError."""
    with _alone(folder):
        members = read(folder)
        of_name = [own for own in members if own.name == name]
        if not of_name or any(own.removed is None for own in of_name):
            raise ConfigError(f"{folder / FILE} has no member {name!r} who was removed")
        back = replace(of_name[-1], removed=None)
        _write(folder, [back if own is of_name[-1] else own for own in members])
        return back


def admit_all(folder: Path) -> list[Member]:
    """Bind the names of all key files of a folder; its members. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of keys: name that of --clients-keys")
    for path in sorted(folder.glob("*.pub")):
        admit(folder, path.stem, certificates.public_key(path))
    return read(folder)


class Roll:
    """The members of a folder, read again whenever the file changes; without one everybody may.

    While a file that was there is away, they are as they were: it lets nobody in who was removed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._written = (0, 0)
        self._members: Sequence[Member] = ()

    def changed(self) -> bool:
        """Look at the file; whether it is another than at the last look."""
        if self._folder is None or (now := written(self._folder / FILE)) == self._written:
            return False
        self._written = now
        if now == (0, 0):
            _log.warning("members not read", why=f"{FILE} is away")
            return False
        try:
            self._members = read(self._folder)
        except ConfigError as error:  # what it was before holds
            _log.warning("members not read", why=str(error))
            return False
        return True

    def binds(self, name: str, public_key: bytes) -> bool:
        """Returns whether the name is bound to this key."""
        return digest(public_key) in self._keys(name)

    def refuse(self, name: str, public_key: bytes) -> str:
        """Why a key may not take part under a name, in one line; "" where it may."""
        key = digest(public_key)
        own = [member for member in self._members if member.key == key]
        if own and all(member.removed for member in own):
            return "its key was removed by the owner of the server"
        if (keys := self._keys(name)) and key not in keys:
            names = [member.name for member in own if not member.removed]
            hint = f"--name {names[-1]}" if names else "another --name"
            return f"the name {name!r} is registered for another key: give this client {hint}"
        return ""

    def _keys(self, name: str) -> set[str]:
        return {own.key for own in self._members if own.name == name and not own.removed}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process changes the file."""
    import fcntl  # a deployment's server runs where there is one

    with (folder / f".{FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, members: Sequence[Member]) -> None:
    text = json.dumps([asdict(member) for member in members], indent=2) + "\n"
    write_atomic(folder / FILE, text.encode(), private=True)


def _removed(member: Member, now: str) -> Member:
    return replace(member, removed=member.removed or now)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
