"""A payload on its way: what a message carries of it, and the payload of a message again."""

from dataclasses import dataclass, field

from corolla.types import Payload
from corolla.wire import compression, messages, scalar_groups
from corolla.wire.compression import PLAIN, Form, Pipeline
from corolla.wire.messages import Reply, Task


@dataclass(frozen=True)
class Sealed:
    """What a message carries of a payload."""

    data: bytes
    """The dense groups, compressed."""
    scalars: Payload
    owed: Payload = field(default_factory=dict)
    """What the steps have left out of differences: to be added to the next payload."""

    @property
    def size(self) -> int:
        """Bytes of the values, framing apart."""
        return value_bytes(self.data, self.scalars)


@dataclass(frozen=True)
class Envelope:
    """Payload ↔ what a message carries: dense groups compressed, as bytes; scalar groups beside."""

    steps: Pipeline = PLAIN

    def seal(
        self,
        payload: Payload,
        seed: int = 0,
        owed: Payload | None = None,
        beside: Payload | None = None,
    ) -> Sealed:
        """What a message carries of a payload; `seed` decides the stochastic rounding.

        With `owed` the payload is of differences, and this was left out of those before it. Groups
        `beside` it travel as they are. Raises WireError for values that are not finite, which no
        lossy step carries, and ValueError for a payload that the steps are not for.
        """
        left: Payload = {}
        if owed is not None and self.steps.needs_differences:
            packed, left = compression.feedback(self.steps, payload, owed, seed)
        else:
            packed = self.steps.pack(payload, seed)
        return Sealed(*messages.enclose({**packed, **(beside or {})}), left)

    def open(
        self, message: Task | Reply, like: Payload | None = None, max_header: int | None = None
    ) -> Payload:
        """The payload of a message, that which was beside it included.

        `like` has its form; without one nothing is decompressed. `max_header` is that of
        codec.decode. Raises WireError when the message has no such payload.
        """
        found = messages.content(message, max_header)
        return found if like is None else self.steps.unpack(found, like)

    def form(self, payload: Payload) -> Form | None:
        """What a receiver must be told to open a payload whose form it cannot know; None: nothing.

        Its `like` is compression.blank of this.
        """
        return None if self.steps == PLAIN else compression.form(scalar_groups.split(payload)[0])


def value_bytes(data: bytes, scalars: Payload) -> int:
    """Bytes of the values that a message carries: what the formulas of papers count.

    `data` is a payload that can be read: what follows its header are values without a gap.
    """
    dense = len(data) - 8 - int.from_bytes(data[:8], "little") if data else 0
    return dense + sum(map(scalar_groups.scalar_bytes, scalars.values()))
