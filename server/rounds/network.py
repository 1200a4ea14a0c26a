"""The members that can be asked in a round, whatever carries the messages."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

from corolla.wire.packet import Packet


class Network(Protocol):
    """The members that can be asked: clients in this process, or behind a Flower Grid.

    Of what is said here of `online` and `seats`, a network that does not know better inherits
    that all are there and none is a gateway.
    """

    def clients(self) -> Mapping[str, int]:
        """Reachable members and their numbers of training examples."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterable[tuple[str, Packet | None]]:
        """Send each member its packet; yield (member, reply) in any order, None for no answer."""

    def online(self) -> AbstractSet[str]:
        """The members that can be asked now."""
        return self.clients().keys()

    def seats(self) -> Mapping[str, int]:
        """The gateways, and how many devices each can ask at a time, at least 1."""
        return {}
