"""A network whose members give their updates to secure sums: three steps for each round."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from corolla.errors import RoundError, SecureSumError, WireError
from corolla.server.rounds.network import Network
from corolla.sums import thresholds
from corolla.sums.messages import Deposit, Masked, Prepare, Seat, Session, Shares
from corolla.sums.opening import Opening
from corolla.sums.quantise import decode
from corolla.sums.roster import Roster
from corolla.sums.round import Summed, SumPlan
from corolla.wire.messages import Reply, pack_reply, unpack_reply
from corolla.wire.packet import Packet


class SumMembers(Protocol):
    """The members of secure sums, beside the tasks that a network carries to them."""

    @property
    def roster(self) -> Roster:
        """The roster of those who may be members, by names of the network."""

    def session(self, member: str, run: bytes) -> Session | None:
        """The session of a member's daemon; None for no answer."""

    def prepare(self, member: str, call: bytes) -> bytes | None:
        """The deposit of a member; None where it has refused, or not answered."""

    def announce(self, listing: bytes) -> None:
        """Tell all members who has deposited; it goes with their tasks."""

    def answer(self, member: str, question: bytes) -> bytes | None:
        """The answer of a member to its question; None where it has refused, or not answered."""


@dataclass
class _Bytes:
    up: int = 0
    down: int = 0


@dataclass
class SecureNetwork:
    """A network that adds up what its members answer, masked, and opens their sum.

    `smallest` is the fewest honest updates in a sum, `corrupt` how many members of the roster may
    be on the server's side.
    """

    network: Network
    members: SumMembers
    smallest: int
    corrupt: int
    plan: SumPlan | None = None
    found: Summed | None = None
    left_out: set[str] = field(default_factory=set)
    """Members that have dealt shares which fit nothing."""

    def clients(self) -> Mapping[str, int]:
        return self.network.clients()

    def online(self) -> AbstractSet[str]:
        return self.network.online() - self.left_out

    def seats(self) -> Mapping[str, int]:
        return self.network.seats()

    def expect(self, plan: SumPlan) -> None:
        self.plan, self.found = plan, None

    def summed(self) -> Summed:
        if self.found is None:
            raise RoundError("no secure sum was made: nobody was asked")
        return self.found

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        """As Network.ask; of members of a sum the replies say that they have answered, no more.

        Raises RoundError where too few have, or their sum cannot be opened.
        """
        plan, self.plan = self.plan, None
        if plan is None or not packets:
            yield from self.network.ask(packets)
            return
        try:
            yield from self._sum(plan, packets)
        except SecureSumError as error:
            raise RoundError(f"round {plan.round}: {error}") from error

    def _sum(
        self, plan: SumPlan, packets: Mapping[str, Packet]
    ) -> Iterator[tuple[str, Packet | None]]:
        """One attempt, from the sessions to the sum."""
        spent, run = _Bytes(), bytes.fromhex(plan.run_id)
        names, seats = self._seats(run, packets)
        missing = thresholds.most_missing(len(seats), self.corrupt, self.smallest)
        call = Prepare(
            run,
            plan.round,
            plan.attempt,
            self.members.roster.sha256,
            missing,
            plan.quantiser,
            tuple(seats),
        )
        opening = Opening(call, self.members.roster, self.corrupt)
        self._deposits(opening, names, spent)
        listing = opening.announce(plan.task).pack()
        self.members.announce(listing)
        asked = {names[number]: packets[names[number]] for number in opening.deposits}
        spent.down += len(listing) * len(asked)
        yield from ((name, None) for name in packets.keys() - asked.keys())
        numbers = {name: number for number, name in enumerate(names)}
        for name, packet in self.network.ask(asked):
            yield name, _taken(opening, numbers[name], packet, spent)
        opening.close()
        self._answers(opening, names, spent)
        self.found = self._opened(opening, names, spent)

    def _seats(self, run: bytes, names: Mapping[str, Packet]) -> tuple[list[str], list[Seat]]:
        """The members that have a session, in the order of the roster, and their seats."""
        roster, there, seats = self.members.roster, list[str](), list[Seat]()
        for index, (name, _) in enumerate(roster.entries):
            session = self.members.session(name, run) if name in names else None
            if session is None:
                continue
            with suppress(SecureSumError):  # the others would refuse it
                seats.append(roster.seat(run, index, session))
                there.append(name)
        return there, seats

    def _deposits(self, opening: Opening, names: Sequence[str], spent: _Bytes) -> None:
        call = opening.call.pack()
        for number, name in enumerate(names):
            spent.down += len(call)
            data = self.members.prepare(name, call)
            if data is not None:
                spent.up += len(data)
                with suppress(SecureSumError):
                    opening.deposit(number, Deposit.unpack(data))

    def _answers(self, opening: Opening, names: Sequence[str], spent: _Bytes) -> None:
        for number, name in enumerate(names):
            question = opening.question(number).pack()
            spent.down += len(question)
            data = self.members.answer(name, question)
            if data is not None:
                spent.up += len(data)
                with suppress(SecureSumError):
                    opening.answer(number, Shares.unpack(data))

    def _opened(self, opening: Opening, names: Sequence[str], spent: _Bytes) -> Summed:
        try:
            opened = opening.open()
        except SecureSumError as error:
            self.left_out |= {names[number] for number in error.named}
            raise
        decoded = decode(opening.call.quantiser, opened.total, len(opened.members))
        quantiser, members = opening.call.quantiser, len(opened.members)
        return Summed(decoded, quantiser, members, spent.up, spent.down)


def _taken(opening: Opening, number: int, packet: Packet | None, spent: _Bytes) -> Packet | None:
    """Add the masked vector of a reply: the reply without it, or with what was wrong."""
    if packet is None:
        return None
    size = opening.call.quantiser.size
    try:
        reply = unpack_reply(packet, len(packet.payload))
        if not (reply.error or reply.missing):
            opening.reply(number, Masked.unpack(reply.payload, size))
            spent.up += len(reply.payload)  # the round takes off the values that it counts
    except SecureSumError as error:
        reply = replace(_blank(reply), error=str(error))
    except WireError:
        return packet  # the gate says what is wrong with it
    return pack_reply(_blank(reply))


def _blank(reply: Reply) -> Reply:
    return replace(reply, payload=b"", num_examples=0, metrics={})
