"""The memory of a device between rounds, on its own disk: groups of tensors by content, a log."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from corolla.directions import seedlog
from corolla.errors import WireError
from corolla.storage.disk import Room
from corolla.storage.folders import client_folder
from corolla.types import Params, Payload
from corolla.wire import codec
from corolla.wire.ids import is_hexadecimal


class Memory:
    """Cached groups of broadcasts, one file per content id.

    Simulated clients of one machine share a folder: equal content is stored once, so memory and
    disk do not grow with their number. The groups in use stay in memory.
    """

    def __init__(self, folder: Path, kept: Path | None = None, room: Room | None = None) -> None:
        """`kept` (default: inside `folder`) holds what outlives a run that is interrupted.

        `room` is asked before a file is written: what writes then raises DiskLimitError.
        """
        self.folder, self.room = folder, room
        self._kept = kept or folder / "kept"
        self._loaded: dict[str, Params] = {}
        self._rows: dict[str, tuple[str, Params]] = {}

    def missing(self, wanted: Mapping[str, str]) -> list[str]:
        """The groups (group → content id) that are not held, or are damaged on disk."""
        return [group for group, content in wanted.items() if not self._load(content)]

    def keep(self, group: str, params: Params, content: str) -> None:
        """Store a received group. Raises WireError when its content is not what was announced."""
        if codec.content_id(params) != content:
            raise WireError(f"cached group {group} does not match its content id")
        self._write(self._path(content), params)
        self._loaded[content] = params

    def recall(self, wanted: Mapping[str, str]) -> Payload:
        """The groups wanted (group → content id). Others are forgotten in memory, not on disk."""
        self._loaded = {i: p for i, p in self._loaded.items() if i in wanted.values()}
        lost = [group for group, content in wanted.items() if not self._load(content)]
        if lost:
            raise WireError(f"cached groups {', '.join(lost)} are missing")
        return {group: self._loaded[content] for group, content in wanted.items()}

    def extend(self, since: str, rows: Sequence[Params]) -> str:
        """Store rows of a log that continue a version; the version that they lead to."""
        for row in rows:
            before, since = since, seedlog.after(since, row)
            if since not in self._rows:
                self._write(self._row_path(since), row, {"before": before})
                self._rows[since] = (before, row)
        return since

    def keep_start(self, version: str, start: Params, number: int) -> None:
        """Store a snapshot: the start for the rows after `version`, row `number` of the run.

        Older ones are deleted.
        """
        path = self._start_path(version)
        self._write(path, start, {"content": codec.content_id(start), "number": str(number)})
        for old in path.parent.glob("start-*.safetensors"):
            if old != path:
                self._drop(old)

    def log(self, version: str, origin: str) -> tuple[Params | None, list[Params], int] | None:
        """How a version is reached: (snapshot, rows after it, number of rows before these).

        The snapshot is None where the rows begin at the first state. None when a row between is
        missing or damaged.
        """
        rows: list[Params] = []
        while version != origin:
            start = self._read_start(version)
            if start is not None:
                return start[0], rows[::-1], start[1]
            entry = self._read_row(version)
            if entry is None:
                return None
            version, row = entry
            rows.append(row)
        return None, rows[::-1], 0

    def path_to(self, version: str, origin: str) -> list[str]:
        """The versions that `log` goes through, the first without rows before it, to `version`."""
        found = [version]
        while found[0] != origin and self._read_start(found[0]) is None:
            entry = self._read_row(found[0])
            if entry is None:
                raise WireError("the log has a gap")
            found.insert(0, entry[0])
        return found

    def stage(self, client: str, round: int, kept: Payload) -> None:
        """Store what a client keeps of a round: it counts once the server has accepted the round.

        What an earlier round staged without being accepted is replaced.
        """
        path = self._kept_path(client, "staged")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        groups = {f"{g}/{n}": tensor for g, own in kept.items() for n, tensor in own.items()}
        self._ask(groups)
        codec.write(str(scratch), groups, {"round": str(round), "groups": json.dumps(list(kept))})
        scratch.replace(path)
        if self.room:
            self.room.settle()

    def kept(self, client: str, accepted: int, commit: bool = True) -> Payload:
        """Returns the payload that a client keeps of round `accepted`.

        `accepted` is the last round with an accepted update. Empty for 0: before the first, or
        where the server asks as if there were none (nothing is deleted). With `commit` what that
        round staged replaces what was kept before: not before the server has written the round
        down, or an interrupted run could not go on from it. Raises WireError when what was accepted
        is lost or damaged.
        """
        staged, last = (self._kept_path(client, name) for name in ("staged", "last"))
        if staged.is_file() and _read(staged)[1].get("round") == str(accepted):
            last = staged.replace(last) if commit else staged
            if self.room:
                self.room.settle()
        if not accepted:
            return {}
        if not last.is_file():
            raise WireError(f"what this device kept of round {accepted} is lost")
        tensors, facts = codec.read(str(last))
        if facts.get("round") != str(accepted):
            raise WireError(
                f"this device kept round {facts.get('round')}, the server accepted {accepted}"
            )
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in json.loads(facts["groups"])}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        return groups

    def kept_folder(self, client: str) -> Path:
        """Where a client keeps what is its own."""
        return client_folder(self._kept, client)

    def prune(self, wanted: Mapping[str, str]) -> None:
        """Delete stored groups that no broadcast names any more."""
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in wanted.values():
                self._drop(path)

    def _load(self, content: str) -> bool:
        """Have a group in memory if it is held; a file whose content changed is deleted."""
        if content not in self._loaded and self._path(content).is_file():
            try:
                params, _ = codec.read(str(self._path(content)))
            except (OSError, WireError):
                params = {}
            if codec.content_id(params) == content:
                self._loaded[content] = params
            else:
                self._drop(self._path(content))
        return content in self._loaded

    def _write(self, path: Path, params: Params, facts: Mapping[str, str] | None = None) -> None:
        if path.exists():
            return
        self._ask(params)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        codec.write(scratch, params, facts)
        Path(scratch).replace(path)
        if self.room:
            self.room.wrote(path)

    def _ask(self, params: Params) -> None:
        if self.room:
            self.room.ask(codec.file_bytes(params))

    def _drop(self, path: Path) -> None:
        if self.room:
            self.room.drop(path)
        else:
            path.unlink(missing_ok=True)

    def _path(self, content: str) -> Path:
        return self.folder / f"{_hex(content)}.safetensors"

    def _kept_path(self, client: str, name: str) -> Path:
        return self.kept_folder(client) / f"{name}.safetensors"

    def _row_path(self, version: str) -> Path:
        return self.folder / "log" / f"row-{_hex(version)}.safetensors"

    def _start_path(self, version: str) -> Path:
        return self.folder / "log" / f"start-{_hex(version)}.safetensors"

    def _read_row(self, version: str) -> tuple[str, Params] | None:
        if version not in self._rows:
            path = self._row_path(version)
            if not path.is_file():
                return None
            params, facts = _read(path)
            before = facts.get("before", "")
            if seedlog.after(before, params) != version:
                self._drop(path)  # or it would never be written again
                return None
            self._rows[version] = (before, params)
        return self._rows[version]

    def _read_start(self, version: str) -> tuple[Params, int] | None:
        path = self._start_path(version)
        if not path.is_file():
            return None
        params, facts = _read(path)
        if facts.get("content") != codec.content_id(params):
            self._drop(path)
            return None
        return params, int(facts["number"])


def _hex(id: str) -> str:
    """An id that becomes a file's name: peers send them. Raises WireError."""
    if not is_hexadecimal(id, 1, 64):
        raise WireError("an id of content has 1 to 64 hexadecimal characters")
    return id


def _read(path: Path) -> tuple[Params, Mapping[str, str]]:
    """A file's tensors and facts; nothing when it is damaged."""
    try:
        return codec.read(str(path))
    except WireError:
        return {}, {}
