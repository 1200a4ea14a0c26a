"""The phones of a gateway between rounds: who they are, and how often they may come."""

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

    def __init__(self, retry: float, known: Callable[[str], bool]) -> None:
        """`retry`: seconds between two check-ins of a phone, on average; `known`: whether the token
        of an owner still counts.
        """
        self._retry, self._known = retry, known
        self.seen: dict[str, Seen] = {}

    def note(self, device: str, seen: Seen) -> None:
        """A phone has checked in; who has been away for longest may be forgotten for it."""
        self.seen.pop(device, None)
        self.seen[device] = seen  # the last one came last
        oldest = next(iter(self.seen))
        if len(self.seen) > _MOST_PHONES or seen.at - self.seen[oldest].at > _FORGET:
            del self.seen[oldest]

    def refuses(self, device: str, token: Token, now: float) -> bool:
        """Returns whether a name stays with its holder: not against a token of this very name."""
        holder = self.seen.get(device)
        if holder is None or token.device or holder.owner == token.owner:
            return False
        return now - holder.at < _FORGET and self._known(holder.owner)

    def present(self, now: float) -> int:
        """How many phones were eligible when they last checked in, not long ago."""
        within = _PRESENT * self.pause()
        return sum(own.eligible and now - own.at <= within for own in self.seen.values())

    def pause(self) -> float:
        """Seconds between two check-ins of a phone, on average."""
        return max(self._retry, len(self.seen) / _CHECK_INS)

    def retry(self, times: float = 1.0) -> pb.RetryWindow:
        """When a phone may come again: after as many pauses, give or take a half."""
        pause = times * self.pause()
        return window(pause / 2, 3 * pause / 2)
