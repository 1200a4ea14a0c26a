"""Bounds on the claims of devices of other people, before they are members of a run."""

from dataclasses import dataclass
from pathlib import Path

from corolla.wire.limits import MAX_NAME, MAX_REPLY_HEADER, MAX_SEATS
from corolla.wire.messages import Reply


@dataclass(frozen=True)
class Limits:
    """Bounds on what a joining member may claim, and on the memory that its replies take."""

    seats: int = MAX_SEATS
    """Seats of one gateway that are used; those above are not."""
    examples: int | None = None
    """Examples that one client may claim: its weight, where it trains on all of them."""
    no_gateways: str = ""
    """Why the run takes none; "": it does."""
    update: int = 1 << 28
    """Bytes of the parameters that a client trains."""

    sums: int | None = None
    """Replies of one phone that a gateway's sums take as much as; None: it sends those of all."""

    def reply(self, seats: int) -> int:
        """Bytes of a reply: twice the parameters, in twice their precision, of each phone.

        A gateway that sends sums has no use for more, however many seats it says it has.
        """
        replies = max(1, seats if self.sums is None else min(seats, self.sums))
        return (1 << 26) + (MAX_REPLY_HEADER + 4 * self.update) * replies

    def refuse(self, reply: Reply, deployed: bool) -> str:
        """The reason to refuse a member with this answer to hello, in one line; "" to accept it.

        In a simulation names come from the data, and may be any.
        """
        name = reply.client
        if deployed and (len(name) > MAX_NAME or not name.isprintable()):
            return f"its name is not printable, or longer than {MAX_NAME} characters"
        if deployed and "/" in name:
            return f"its name {name!r} has a /, as those of phones behind a gateway"
        if reply.seats:
            return self.no_gateways
        if not reply.num_examples:
            return f"client {name!r} has no examples to train on"
        if self.examples is not None and reply.num_examples > self.examples:
            return (
                f"client {name!r} has {reply.num_examples} examples, more than max-examples "
                f"{self.examples}"
            )
        return ""


@dataclass(frozen=True)
class Admission:
    """The conditions to become a member of a run, and how many members it begins with."""

    nodes: int = 1
    """Nodes that must be online and have said who they are."""
    clients: int = 0
    """Members that must have data; 0: whoever of the nodes has some."""
    wait: float | None = None
    """Seconds to wait for them; None: as long as for a round."""
    names: Path | None = None
    """The file of which key has which name: it outlives the process."""
    members: Path | None = None
    """The folder of registered keys, whose members.json says which key has which name."""
    limits: Limits | None = None
    """For devices of other people; None: those of a simulation."""
