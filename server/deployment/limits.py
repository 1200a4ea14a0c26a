"""What devices of other people may claim to be, before they are members of a run."""

from dataclasses import dataclass

from corolla.wire import limits
from corolla.wire.messages import Reply


@dataclass(frozen=True)
class Limits:
    """Of one member, and of the memory that a reply of it takes."""

    seats: int = limits.MAX_SEATS
    """Of one gateway; those above are not used."""
    examples: int | None = None
    """Of one client, whose weight they are where it trains on all of them."""
    no_gateways: str = ""
    """Why the run takes none; "": it does."""
    update: int = 1 << 28
    """Bytes of the parameters that a client trains."""

    def reply(self, seats: int) -> int:
        """Bytes of a reply: twice the parameters, in twice their precision, of each phone."""
        return (1 << 26) + (limits.MAX_REPLY_HEADER + 4 * self.update) * max(1, seats)

    def refuse(self, reply: Reply, deployed: bool) -> str:
        """Why who says this of itself cannot be a member, in one line; "" when it can.

        In a simulation names come from the data, and may be any.
        """
        name = reply.client
        if deployed and (len(name) > limits.MAX_NAME or not name.isprintable()):
            return f"its name is not printable, or longer than {limits.MAX_NAME} characters"
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
