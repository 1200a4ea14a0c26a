"""Expectations of a valid reply, and verdicts on replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto

from corolla.types import Payload, Space
from corolla.wire import limits
from corolla.wire.compression import PLAIN, Pipeline
from corolla.wire.messages import Reply


class Code(StrEnum):
    """The outcome of a reply."""

    ACCEPTED = auto()
    NO_ANSWER = auto()
    CLIENT_ERROR = auto()
    """The client says itself that it could not do the task."""
    MISSING = auto()
    """The client has lost cached groups."""
    MALFORMED = auto()
    """No message at all, or one that contradicts itself."""
    FOREIGN = auto()
    """Of another run, client, kind of task or base model."""
    STALE = auto()
    """Of another round or version."""
    VERSION = auto()
    """Of another schema."""
    TOO_LARGE = auto()
    FORM = auto()
    """Other groups, names, shapes or types than those of an update."""
    NOT_FINITE = auto()
    NORM = auto()
    WEIGHT = auto()
    """More examples, or fewer, than the client can have."""
    LATE = auto()
    """After the deadline: said by who keeps the time."""
    BUDGET = auto()
    """Of a client that may not take part now: said by who keeps the account of privacy."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a reply and why: one printable line, "" of a reply that was accepted."""

    code: Code
    why: str = ""

    @property
    def accepted(self) -> bool:
        """True where the reply counts."""
        return self.code == Code.ACCEPTED


@dataclass(frozen=True)
class Expected:
    """The form and the bounds of a valid reply to one task.

    `like` is the form of an update (Strategy.update_like), None where no payload is expected;
    `codec` how it travels. `most_examples` is the largest weight of one client. `max_norm` bounds
    the joint L2 norm of an update in `space` (see robust.py), where None leaves the bound of 1e6 on
    each value. With `most_clients` the reply is that of a gateway for at most so many clients: a
    partial aggregate of the form `sums` (Summable.sums_like), or without one, a bundle of replies;
    `member` says what is expected of each by name, where that is not the same of all: one form for
    each class that it can be of. `parts` are the groups of `sums` that each class adds to and the
    largest weight of one client of it, where `like` holds those of several: what is sent are the
    groups of some of the classes, or of all. `tally` reads how much of the sums is of which class
    (see Tallied), where they say so.
    """

    like: Payload | None
    codec: Pipeline = PLAIN
    most_examples: int = limits.MAX_EXAMPLES
    max_norm: float | None = None
    sums: Payload | None = None
    most_clients: int = 0
    space: Space = "tensors"
    member: "Callable[[str], Sequence[Expected]] | None" = None
    parts: Mapping[frozenset[str], int] = field(default_factory=dict)
    tally: Callable[[Payload], Mapping[str, tuple[float, float]]] | None = None
    masked: int = 0
    """Bytes of the masked vector that came in a reply, where updates go to a secure sum."""


@dataclass(frozen=True)
class Judged:
    """A verdict; of an accepted reply also the reply and its update (or partial aggregate).

    `content` counts the bytes of the values as they were sent. `members` holds the replies in a
    bundle by the name of their client, where the gateway itself has no update.
    """

    verdict: Verdict
    reply: Reply | None = None
    update: Payload = field(default_factory=dict)
    content: int = 0
    members: "Mapping[str, Judged]" = field(default_factory=dict)
