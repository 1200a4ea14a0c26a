"""The phones of a gateway between rounds: who they are, and how often they may come."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from corolla.phones.protocol import window
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.access import Token

_CHECK_INS = 200
"""Check-ins a second, at most: with many phones each is asked to stay away for longer."""
_FORGET = 86_400.0
"""Seconds after which a phone that does not come any more is forgotten."""
_PRESENT = 3
"""Pauses after which a phone that has not checked in again no longer counts as present."""
_MOST_PHONES = 1 << 16


@dataclass(frozen=True)
class Seen:
    """The facts that are known of a phone between rounds."""

    owner: str
    examples: int
    at: float
    eligible: bool


class Roster:
    """The phones that have checked in, by name. The lock of the gateway's Rounds guards it."""

    def __init__(
        self,
        retry: float,
        known: Callable[[str], bool],
        names: Callable[[str], bool] = lambda device: False,
    ) -> None:
        """`retry`: seconds between two check-ins of a phone, on average; `known`: whether the token
        of an owner still counts; `names`: whether a device has a token of its own.
        """
        self._retry, self._known, self._names = retry, known, names
        self.seen: dict[str, Seen] = {}
        self._held = Counter[str]()
        """Owner → names that its token has."""

    def note(self, device: str, seen: Seen) -> None:
        """A phone has checked in; who has been away for longest may be forgotten for it."""
        self._forget(device)
        self.seen[device] = seen  # the last one came last
        self._held[seen.owner] += 1
        oldest = next(iter(self.seen))
        if seen.at - self.seen[oldest].at > _FORGET:
            self._forget(oldest)
        if len(self.seen) > _MOST_PHONES:
            most = max(self._held, key=lambda owner: self._held[owner])
            self._forget(next(name for name, own in self.seen.items() if own.owner == most))

    def refuses(self, device: str, token: Token, now: float) -> bool:
        """Returns whether a name stays with its holder: not against a token of this very name.

        Where there is such a token, the name is never that of another.
        """
        if token.device or self._names(device):
            return not token.device
        holder = self.seen.get(device)
        if holder is None or holder.owner == token.owner:
            return False
        return now - holder.at < _FORGET and self._known(holder.owner)

    def present(self, now: float) -> int:
        """How many phones were eligible when they last checked in, not long ago."""
        within = _PRESENT * self.pause()
        return sum(own.eligible and now - own.at <= within for own in self.seen.values())

    def pause(self, owner: str | None = None) -> float:
        """Seconds between two check-ins of a phone, on average; of an `owner` with few, fewer."""
        phones = len(self.seen)
        if owner is not None:
            phones = min(phones, self._held[owner] * len(self._held))
        return max(self._retry, phones / _CHECK_INS)

    def retry(self, owner: str, times: float = 1.0) -> pb.RetryWindow:
        """The time when a phone may come again: after as many pauses, give or take a half."""
        pause = times * self.pause(owner)
        return window(pause / 2, 3 * pause / 2)

    def _forget(self, device: str) -> None:
        if own := self.seen.pop(device, None):
            self._held[own.owner] -= 1
            if not self._held[own.owner]:
                del self._held[own.owner]
