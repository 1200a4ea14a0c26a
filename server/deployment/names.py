"""Names of clients in a run: those of members are their keys', others their first key's."""

import hashlib
import json
from pathlib import Path

from corolla.host.files import write_atomic
from corolla.server.deployment.members import Roll


class Names:
    """Says which key has which name. `stored` outlives the process; None: a simulation."""

    def __init__(self, stored: Path | None, members: Path | None) -> None:
        """`members` is the folder of registered keys; None: there is none."""
        self._stored, self._roll = stored, Roll(members)
        self._roll.changed()
        self._first = _read(stored)

    def changed(self) -> bool:
        """Returns whether the members are others than at the last look."""
        return self._roll.changed()

    def refuse(self, name: str, public_key: bytes) -> str:
        """Why a key, given in PEM, does not get a name, in one line; "" where it does."""
        if why := self._roll.refuse(name, public_key):
            return why
        key = _digest(public_key)
        if self._roll.binds(name, public_key) or self._first.get(name, key) == key:
            return ""
        return f"two nodes say they are client {name!r}: the first keeps it"

    def keep(self, name: str, public_key: bytes) -> None:
        """A client has joined."""
        key = _digest(public_key)
        if self._stored and self._first.get(name) != key:
            self._first[name] = key
            write_atomic(self._stored, json.dumps(self._first, indent=2).encode())


def _digest(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()


def _read(path: Path | None) -> dict[str, str]:
    try:
        loaded: dict[str, str] = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return loaded
