"""The keys of clients that may join: looked for in a folder while the server runs."""

from collections.abc import Callable
from pathlib import Path

from corolla.errors import CorollaError
from corolla.host import certificates, logs
from corolla.server.deployment import members
from corolla.server.deployment.front import fingerprint
from corolla.server.deployment.superlink import Control

_log = logs.logger("supervisor")


class ClientKeys:
    """The files *.pub of a folder, each registered with the SuperLink when it is new or changes.

    Each binds the name of its file to its key (see members.py).
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        """`say` tells the user a line; without a folder there are no keys."""
        self._folder, self._say = folder, say
        self._written: dict[Path, float] = {}  # of files that have been looked at
        self._complaints: set[str] = set()
        self.registered: set[str] = set()

    def register(self, control: Control) -> None:
        """Register keys that are new; a file that is no key is said once.

        Raises httpx.HTTPError while the SuperLink is away.
        """
        folder = self._folder
        try:
            paths = sorted(folder.glob("*.pub")) if folder else []
        except OSError as error:
            self._complain(f"{folder} cannot be listed: {error}")
            return
        for path in paths:
            try:
                written = path.stat().st_mtime
                if self._written.get(path) == written:
                    continue
                pem = certificates.public_key(path)
                if not self._admitted(path, pem):
                    continue  # it may be let in again by the next look
                new = control.register(pem)
            except (CorollaError, OSError) as error:
                self._complain(f"left out: {error}")
                if isinstance(error.__cause__ or error, OSError):
                    continue  # it may be there at the next look
            else:
                if new:
                    _log.info("key registered", client=path.stem, key=fingerprint(pem))
            self._written[path] = written

    def forget(self) -> None:
        """Register all again: they are new to a SuperLink that has lost its database."""
        self._written.clear()

    def _admitted(self, path: Path, pem: bytes) -> bool:
        """Returns whether the key may join; its name is its own from now on. Raises ConfigError."""
        try:
            if not members.admit(path.parent, path.stem, pem):
                self._complain(
                    f"left out: {path.stem} was removed: corolla members {path.parent} --restore "
                    f"{path.stem} lets it in again"
                )
                return False
        except OSError as error:  # a folder that nobody may write in: names are as they were
            self._complain(f"names are not bound to keys: {error}")
        self.registered.add(path.stem)
        return True

    def _complain(self, text: str) -> None:
        if text not in self._complaints:
            self._complaints.add(text)
            self._say(text)
            _log.warning("key left out", why=text)
