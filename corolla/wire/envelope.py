"""A payload on its way: what a message carries of it, and the payload of a message again."""

from dataclasses import dataclass, field

from corolla.types import Payload
from corolla.wire import compression, messages, scalar_groups
from corolla.wire.compression import PLAIN, Pipeline
from corolla.wire.messages import Reply, Task


@dataclass(frozen=True)
class Sealed:
    """A payload as a message carries it: dense groups as bytes, scalar groups beside."""

    data: bytes
    """The dense groups, compressed."""
    scalars: Payload
    owed: Payload = field(default_factory=dict)
    """The remainders of differences that the steps left out: to be added to the next payload."""

    @property
    def size(self) -> int:
        """Bytes of the values, framing apart."""
        return value_bytes(self.data, self.scalars)


@dataclass(frozen=True)
class Envelope:
    """Payload ↔ what a message carries: dense groups compressed, as bytes; scalar groups beside."""

    steps: Pipeline = PLAIN

    @property
    def owes(self) -> bool:
        """Its payloads are differences, of which it leaves out what the next are to make good."""
        return self.steps.needs_differences

    def seal(
        self,
        payload: Payload,
        seed: int = 0,
        owed: Payload | None = None,
        beside: Payload | None = None,
    ) -> Sealed:
        """Packs a payload for a message; `seed` decides the stochastic rounding.

        With `owed` the payload is of differences, and this was left out of those before it. Groups
        `beside` it travel as they are. Raises WireError for values that are not finite, which no
        lossy step carries, and ValueError for a payload that the steps are not for.
        """
        left: Payload = {}
        if owed is not None and self.owes:
            packed, left = compression.feedback(self.steps, payload, owed, seed)
        else:
            packed = self.steps.pack(payload, seed)
        return Sealed(*messages.enclose({**packed, **(beside or {})}), left)

    def open(
        self, message: Task | Reply, like: Payload | None = None, max_header: int | None = None
    ) -> Payload:
        """The payload of a message, that which was beside it included.

        `like` has the form of what was compressed, values of it do not count; without one nothing
        was. `max_header` is that of codec.decode. Raises WireError for another message.
        """
        found = messages.content(message, max_header)
        return found if like is None else self.steps.unpack(found, like)

    def like(self, payload: Payload) -> Payload | None:
        """Returns the dense groups, whose form `open` asks for; None if nothing is compressed."""
        return None if self.steps == PLAIN else scalar_groups.split(payload)[0]


def value_bytes(data: bytes, scalars: Payload) -> int:
    """Bytes of the values that a message carries: what the formulas of papers count.

    `data` is a payload that can be read: what follows its header are values without a gap.
    """
    dense = len(data) - 8 - int.from_bytes(data[:8], "little") if data else 0
    return dense + sum(map(scalar_groups.scalar_bytes, scalars.values()))
