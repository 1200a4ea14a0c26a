"""The journal of a run: what was decided, written down before it is done (write-ahead).

`journal.jsonl` in the run's folder. A line is a JSON object with `event`, `time` (UTC), `seconds`
(how long the run has been running, resumptions included, pauses counted, not while no process ran)
and facts; its last key `sha256` is the hash of the line before it and of everything before that
key, so that no line can be changed, lost or moved unseen. Each line is on disk before its event
takes effect:

    started    run id; rounds; round and state (sha256) it starts from; roster {member: examples},
               seats {gateway: seats}
    resumed    as started: another process goes on
    joined     roster and seats of members that come after those that are known, or have changed
    planned    round, attempt, cohort {member: seats}, base_version, seed, how many are online;
               before anything is sent
    verdicts   round, attempt, verdicts {client: code}, why {client: reason} of those refused
    privacy    round, and what a mechanism spends; before a noisy model is released
    committed  round, state: sha256 of the checkpoint's tensors; after the checkpoint is on disk
    abandoned  round, attempt, why; the model is as it was
    paused     round, online, needed: too few members can be asked; ends with the next event
    stopped    why; the run can be resumed
    failed     why; the run can be resumed, but the cause should be removed first
    done       why: all rounds, or a stop condition

A crash may tear the last line: it is dropped, for what it announces has not been done. Damage
anywhere else is an error.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from corolla.errors import ArtefactError, ConfigError

NAME = "journal.jsonl"
ORDER = "server.json"
"""There where a server runs it: what its ServerApp is to do."""

Event = Literal[
    "started",
    "resumed",
    "joined",
    "planned",
    "verdicts",
    "privacy",
    "committed",
    "abandoned",
    "paused",
    "stopped",
    "failed",
    "done",
]
Entry = Mapping[str, Any]
"""A line of the journal without its checksum."""

_SEAL = ', "sha256": "'
_TAIL = len(_SEAL) + 64 + len('"}')


class Journal:
    """The open journal of one running process; a folder has one at a time.

    Raises ConfigError when another process is at work in the folder, ArtefactError for a damaged
    journal or one that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        new = not self.path.exists()
        try:
            self._file = FileIO(self.path, "a+")  # no buffer: what is written is written now
        except OSError as error:
            raise ArtefactError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            _lock(self._file, folder)
            entries, seal, end, self.note = _parse(_content(self._file), self.path)
            self._tail = end, seal
            if new:
                sync_folder(folder)
        except BaseException:
            self._file.close()
            raise
        self.past = past(entries)
        self._before = float(entries[-1]["seconds"]) if entries else 0.0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """How long this run has been running, in all its processes."""
        return self._before + time.monotonic() - self._began

    def append(self, event: Event, **facts: Any) -> None:
        """Write a line; it is on disk when this returns. Raises ArtefactError when it cannot be."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"event": event, "time": now, "seconds": round(self.seconds, 3), **facts}
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
            raise ArtefactError(
                f"{self.path} cannot be written: {error.strerror}; what is committed is kept: "
                f"go on with --resume"
            ) from error
        self._tail = end + len(line), seal


@dataclass(frozen=True)
class Past:
    """What a journal says that a run which goes on has to know."""

    roster: Mapping[str, int] = field(default_factory=dict)
    """Member → examples, in the order in which members came."""
    seats: Mapping[str, int] = field(default_factory=dict)
    """Gateway → seats."""
    committed: Mapping[int, str] | None = None
    """Round → sha256 of its state; None: there is no journal to ask."""
    plans: Mapping[int, Entry] = field(default_factory=dict)
    """Round → its last plan."""
    abandoned: Mapping[int, int] = field(default_factory=dict)
    """Round → how many attempts at it were abandoned."""

    @property
    def round(self) -> int:
        """The last committed round; 0 before the first."""
        return max(self.committed or (), default=0)

    def plan(self, round: int) -> Entry | None:
        """The plan of a round that is to be carried out (again); None when there is none."""
        plan = self.plans.get(round)
        return plan if plan and plan["attempt"] == self.attempt(round) else None

    def attempt(self, round: int) -> int:
        """The number of the attempt at a round that is not abandoned."""
        return self.abandoned.get(round, 0)


def past(entries: Sequence[Entry]) -> Past:
    """What has happened so far."""
    roster: dict[str, int] = {}
    seats: dict[str, int] = {}
    committed: dict[int, str] = {}
    plans: dict[int, Entry] = {}
    abandoned: dict[int, int] = {}
    for entry in entries:
        roster |= entry.get("roster", {})
        seats |= entry.get("seats", {})
        match entry["event"]:
            case "started" | "resumed" | "committed":
                if entry["round"]:
                    committed[entry["round"]] = entry["state"]
            case "planned":
                plans[entry["round"]] = entry
            case "abandoned":
                abandoned[entry["round"]] = entry["attempt"] + 1
    return Past(roster, seats, committed if entries else None, plans, abandoned)


def read(folder: Path) -> list[Entry]:
    """All whole lines, the oldest first; empty when there is no journal.

    Raises ArtefactError when it is damaged elsewhere than at its end.
    """
    path = folder / NAME
    try:
        return _parse(path.read_bytes(), path)[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error


def alive(folder: Path) -> bool | None:
    """Whether a process is at work in a run's folder; None where that cannot be known."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        with (folder / NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to disk; files themselves are synced by who writes them."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fail_point(name: str, round: int) -> None:
    """For tests of kills: the process dies here if COROLLA_FAIL_AT is "name:round"."""
    if os.environ.get("COROLLA_FAIL_AT") == f"{name}:{round}":
        os.kill(os.getpid(), signal.SIGKILL)


def _sealed(before: str, body: str) -> str:
    return hashlib.sha256((before + body).encode()).hexdigest()


def _content(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall()


def _parse(content: bytes, path: Path) -> tuple[list[Entry], str, int, str]:
    """(lines, the last checksum, bytes that are whole, a note of what was dropped)."""
    *whole, rest = content.split(b"\n")
    lines = [line + b"\n" for line in whole] + ([rest] if rest else [])
    entries: list[Entry] = []
    seal, intact = "", 0
    for number, line in enumerate(lines, start=1):
        entry = _entry(line, seal)
        if entry is None:
            torn = not line.endswith(b"\n") or b"\0" in line  # what a crash can leave
            if number < len(lines) or not torn:
                raise ArtefactError(
                    f"{path} is damaged in line {number} of {len(lines)}: restore it from a copy, "
                    f"or start a new run"
                )
            return entries, seal, intact, f"the last line of {path} was torn: dropped"
        entries.append(entry)
        seal, intact = line[-_TAIL - 1 :][len(_SEAL) : -3].decode(), intact + len(line)
    return entries, seal, intact, ""


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


def _lock(file: FileIO, folder: Path) -> None:
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
                raise ConfigError(
                    f"another process is running in {folder}: stop it, or name another folder"
                ) from None
            time.sleep(0.05)
        except OSError:
            return
