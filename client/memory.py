"""What a device keeps between rounds: groups of tensors by content, on its own disk."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from corolla import codec
from corolla.errors import WireError
from corolla.types import Params, Payload


class Memory:
    """Cached groups of broadcasts, one file per content id.

    Simulated clients of one machine share a folder: equal content is stored once, so memory and
    disk do not grow with their number. The groups in use stay in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, Params] = {}

    def missing(self, wanted: Mapping[str, str]) -> list[str]:
        """The groups (group → content id) that are not held, or are damaged on disk."""
        return [group for group, content in wanted.items() if not self._load(content)]

    def keep(self, group: str, params: Params, content: str) -> None:
        """Store a received group. Raises WireError when its content is not what was announced."""
        if codec.content_id(params) != content:
            raise WireError(f"cached group {group} does not match its content id")
        if not self._path(content).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            codec.write(scratch, params)
            Path(scratch).replace(self._path(content))
        self._loaded[content] = params

    def recall(self, wanted: Mapping[str, str]) -> Payload:
        """The groups wanted (group → content id). Others are forgotten in memory, not on disk."""
        self._loaded = {i: p for i, p in self._loaded.items() if i in wanted.values()}
        lost = [group for group, content in wanted.items() if not self._load(content)]
        if lost:
            raise WireError(f"cached groups {', '.join(lost)} are missing")
        return {group: self._loaded[content] for group, content in wanted.items()}

    def prune(self, wanted: Mapping[str, str]) -> None:
        """Delete stored groups that no broadcast names any more."""
        for path in self.folder.glob("*.safetensors"):
            if path.stem not in wanted.values():
                path.unlink(missing_ok=True)

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
                self._path(content).unlink(missing_ok=True)
        return content in self._loaded

    def _path(self, content: str) -> Path:
        return self.folder / f"{content}.safetensors"
