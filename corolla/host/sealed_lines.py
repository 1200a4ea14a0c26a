"""Files of JSON lines, each sealed over all before it: damage within a file does not go unseen.

The last key of a line, `sha256`, is the hash of that key of the line before it and of everything
before it in its own: no line can be changed, moved, or lost from among others without a trace. The
end is not sealed: lines that are lost from there, or a whole file put back from an older copy,
leave none, nor does a file that was deleted. Against an owner nothing is sealed, hashes have no
key. A line is on disk before `append` returns. A crash may tear the last one: it is dropped, for
what it announces has not been done. Damage anywhere else is an error.
"""

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from corolla.errors import ArtefactError, ConfigError
from corolla.host.files import sync_folder

Entry = Mapping[str, Any]
"""A line without its checksum."""

_SEAL = ', "sha256": "'
_TAIL = len(_SEAL) + 64 + len('"}')


@dataclass(frozen=True)
class Content:
    """The whole lines of a file, oldest first, and what of a last one a crash has left."""

    entries: list[Entry]
    torn: bytes
    seal: str
    """The last checksum."""
    end: int
    """Bytes that are whole."""


class Chained:
    """The open file of one process; a file has one at a time. Made when there is none.

    `content` is what was there. `busy` says of what another process is at work, `remedy` what to do
    with a file that is damaged. Raises ConfigError when another process has it open, ArtefactError
    when it is damaged or cannot be written.
    """

    def __init__(self, path: Path, busy: str, remedy: str) -> None:
        self.path = path
        new = not path.exists()
        try:
            self._file = FileIO(path, "a+")  # no buffer: what is written is written now
        except OSError as error:
            raise ArtefactError(f"{path} cannot be written: {error.strerror}") from error
        try:
            _lock(self._file, busy)
            self._file.seek(0)
            self.content = _parse(self._file.readall(), path, remedy)
            self._tail = self.content.end, self.content.seal
            if new:
                sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, entry: Entry) -> None:
        """Write a line; it is on disk when this returns. Raises ArtefactError when it cannot be."""
        body = json.dumps(entry, allow_nan=False)[:-1]
        end, before = self._tail
        seal = _sealed(before, body)
        line = f'{body}{_SEAL}{seal}"}}\n'.encode()
        try:
            self._file.truncate(end)  # of a line that was not finished, or torn
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ArtefactError(f"{self.path} cannot be written: {error.strerror}") from error
        self._tail = end + len(line), seal


def read(path: Path, remedy: str) -> Content:
    """Returns the content of a file; an empty one when there is no file.

    Raises ArtefactError when it is damaged elsewhere than at its end.
    """
    try:
        return _parse(path.read_bytes(), path, remedy)
    except FileNotFoundError:
        return Content([], b"", "", 0)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error


def alive(path: Path) -> bool | None:
    """Returns whether a process has the file open; None where that cannot be known."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def facts(torn: bytes) -> Entry | None:
    """Returns the entry that a torn line was to hold; None when too little of it is left."""
    body, seal, _ = torn.decode(errors="replace").partition(_SEAL)
    try:
        entry = json.loads(body + "}" if seal else body)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _sealed(before: str, body: str) -> str:
    return hashlib.sha256((before + body).encode()).hexdigest()


def _parse(content: bytes, path: Path, remedy: str) -> Content:
    *whole, rest = content.split(b"\n")
    lines = [line + b"\n" for line in whole] + ([rest] if rest else [])
    entries: list[Entry] = []
    seal, intact = "", 0
    for number, line in enumerate(lines, start=1):
        entry = _entry(line, seal)
        if entry is None:
            torn = not line.endswith(b"\n") or b"\0" in line  # what a crash can leave
            if number < len(lines) or not torn:
                raise ArtefactError(f"{path} is damaged in line {number} of {len(lines)}: {remedy}")
            return Content(entries, line, seal, intact)
        entries.append(entry)
        seal, intact = line[-_TAIL - 1 :][len(_SEAL) : -3].decode(), intact + len(line)
    return Content(entries, b"", seal, intact)


def _entry(line: bytes, before: str) -> Entry | None:
    """A line's facts; None unless it is whole and follows the line with that checksum."""
    try:
        text = line.decode()
        body = text[: -_TAIL - 1]
        if text != f'{body}{_SEAL}{_sealed(before, body)}"}}\n':
            return None
        entry = json.loads(body + "}")
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _lock(file: FileIO, busy: str) -> None:
    """Held until the file is closed, by whatever end the process finds.

    Who asks `alive` holds a lock as well, for an instant: hence more than one try. File systems
    without locks are used without.
    """
    if sys.platform == "win32":
        return
    import fcntl

    for left in range(9, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise ConfigError(f"another process is {busy}") from None
            time.sleep(0.05)
        except OSError:
            return
