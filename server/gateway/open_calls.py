"""Which calls of phones are open, and which of them is ended for one more.

A call that waits for its request costs its caller nothing. So it holds no thread, and where a
connection, a token or the gateway has as many calls open as it may, the one that has waited for
longest ends, and the new one goes on: a request comes at once from whoever has one to send.
"""

from collections.abc import Callable
from dataclasses import dataclass

MOST = {"connection": 16, "token": 256, "gateway": 1024}
"""Calls open at a time: of one connection, of all phones with one token, of all."""


@dataclass(frozen=True, eq=False)
class OpenCall:
    """A call of the phone at `connection`, with the token of `owner`."""

    connection: str
    owner: str
    end: Callable[[], None]
    """Ends it while it waits for its request."""


class OpenCalls:
    """Counts open calls. For the use of one thread."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], dict[OpenCall, bool]] = {}
        """What calls are counted for → those that are open, oldest first, and whether each waits
        for its request.
        """

    def enter(self, call: OpenCall) -> bool:
        """Count a call that waits for its request; False: it is one too many, and not counted."""
        for group in _groups(call):
            own = self._open.get(group, {})
            if len(own) < MOST[group[0]]:
                continue
            oldest = next((open for open, waits in own.items() if waits), None)
            if oldest is None:
                return False
            self.leave(oldest)
            oldest.end()
        for group in _groups(call):
            self._open.setdefault(group, {})[call] = True
        return True

    def heard(self, call: OpenCall) -> None:
        """The request of a call has come: from now on it is at work."""
        for group in _groups(call):
            if call in self._open.get(group, {}):
                self._open[group][call] = False

    def leave(self, call: OpenCall) -> None:
        """A call is over, for whatever reason."""
        for group in _groups(call):
            own = self._open.get(group, {})
            own.pop(call, None)
            if not own:
                self._open.pop(group, None)


def _groups(call: OpenCall) -> tuple[tuple[str, str], ...]:
    return ("connection", call.connection), ("token", call.owner), ("gateway", "")
