"""The roster of secure sums: who may be a member, by name and identity key."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from corolla.errors import SecureSumError
from corolla.sums import boxes, transcript
from corolla.sums.messages import Seat, Session

_MOST = 65_535


@dataclass(frozen=True)
class Roster:
    """Names and Ed25519 identity keys, in an order that stays.

    A hash pins it on every device: it does not say that its members are who they seem to be.
    """

    entries: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        names, keys = {name for name, _ in self.entries}, {key for _, key in self.entries}
        if not len(self.entries) == len(names) == len(keys) <= _MOST:
            raise SecureSumError("a roster has each name and each key once, 65535 at most")

    @cached_property
    def sha256(self) -> bytes:
        """The hash of all names and keys."""
        return transcript.roster(self.entries)

    def name(self, index: int) -> str:
        """The name of a member by its place."""
        return self.entries[index][0]

    def key(self, index: int) -> bytes:
        """The identity key of a member by its place."""
        return self.entries[index][1]

    def check_sessions(self, run: bytes, seats: Iterable[Seat]) -> None:
        """Raises SecureSumError unless each seat has a session that its member has signed."""
        last = -1
        for seat in seats:
            if not last < seat.index < len(self.entries):
                raise SecureSumError(
                    f"member {seat.index} is not in the roster, or not after member {last}"
                )
            last, (name, key) = seat.index, self.entries[seat.index]
            text = transcript.session(run, self.sha256, name, seat.box_key)
            if not boxes.signed(key, seat.signature, text):
                raise SecureSumError(f"the session of {name!r} is not signed by its identity key")

    def seat(self, run: bytes, index: int, session: Session) -> Seat:
        """The seat of a member, whose session a server has checked.

        Raises SecureSumError for a session that the other members would refuse.
        """
        boxes.agree(X25519PrivateKey.generate(), session.box_key)
        seat = Seat(index, session.box_key, session.signature)
        self.check_sessions(run, [seat])
        return seat
