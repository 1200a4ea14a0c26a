"""How many callers a server has at a time, and which of them ends for one more.

Who waits costs nothing, so the bound alone would let those that say nothing keep all others out.
Where there are as many as may be, the one that has waited for longest ends, and the new one goes
on: what a server waits for comes at once from whoever has it. Nobody holds a place but for the time
in which the server itself is at work: who has to take an answer, or may ask again, waits as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

_SUBNET = 64
"""Bits of an IPv6 address that its network has; whoever has one address there has them all."""


def network(address: str) -> str:
    """Returns the place whose callers count together: an IPv4 address, or an IPv6 network.

    A text that is no address, of a local socket for example, is returned as it is.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped:  # IPv4 callers of a socket that listens for both
        return str(found.ipv4_mapped)
    return str(ip_network((int(found), _SUBNET), strict=False))


@dataclass(eq=False)
class Occupant:
    """A call or a connection that waits for what its caller has to send or to take."""

    bounds: Mapping[str, int]
    """The addresses that an occupant counts for → how many occupants each may have at a time."""
    end: Callable[[], object]
    """Ends it while it waits."""


class Occupancy:
    """Counts occupants. For the use of one thread."""

    def __init__(self) -> None:
        self._open: dict[str, dict[Occupant, bool]] = {}
        """Address → the occupants that count for it, oldest first, and True for each that waits."""

    def enter(self, occupant: Occupant) -> bool:
        """Count one that waits; False: it is one too many, and not counted."""
        for name, most in occupant.bounds.items():
            own = self._open.get(name, {})
            if len(own) < most:
                continue
            oldest = next((other for other, waits in own.items() if waits), None)
            if oldest is None:
                return False
            self.leave(oldest)
            oldest.end()
        for name in occupant.bounds:
            self._open.setdefault(name, {})[occupant] = True
        return True

    def wait(self, occupant: Occupant) -> None:
        """Notes that an occupant waits for its caller, from now on: others have waited longer."""
        for name in occupant.bounds:
            own = self._open.get(name, {})
            if own.pop(occupant, None) is not None:
                own[occupant] = True

    def settle(self, occupant: Occupant) -> None:
        """Notes that an occupant no longer waits: it does not end for another until it does."""
        for name in occupant.bounds:
            if occupant in self._open.get(name, {}):
                self._open[name][occupant] = False

    def leave(self, occupant: Occupant) -> None:
        """One is over, for whatever reason."""
        for name in occupant.bounds:
            own = self._open.get(name, {})
            own.pop(occupant, None)
            if not own:
                self._open.pop(name, None)
