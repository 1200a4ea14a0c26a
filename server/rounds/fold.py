"""The answers of a round, folded in one after another."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from corolla.aggregation.robust import Robust
from corolla.aggregation.sums import summable
from corolla.interfaces import Aggregator
from corolla.privacy.clipped_sum import ClippedSum
from corolla.server.rounds import buffer, expectations
from corolla.server.rounds.asking import Answer
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.defence import defence_of
from corolla.server.rounds.federation import Held
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.tasks import accepted_note, accepted_only
from corolla.server.rounds.verdicts import Code, Judged, Verdict
from corolla.strategies.listing import registry
from corolla.types import Metrics


@dataclass
class Fold:
    """The updates of a round in an aggregator, and what is said of each."""

    call: RoundCall
    spending: Spending
    aggregator: Aggregator
    defence: Robust | None = None
    """The aggregator, where a robust rule stands before the strategy's."""
    clipped: ClippedSum | None = None
    """The aggregator, where noise is put on its sum: with dp=client."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    staleness: list[int] = field(default_factory=list)
    updates: dict[str, int] = field(default_factory=dict)
    """Member → how many updates came from it."""
    asked: dict[str, int] = field(default_factory=dict)
    """Member → how many updates it was asked for."""
    answered: int = 0
    """Replies, those of a gateway's devices one by one."""

    def add_all(self, answers: Iterable[Answer]) -> Held:
        """Fold in all answers: who holds what afterwards."""
        federation = self.call.federation
        traits, uplink = registry.traits(federation.strategy), federation.config.uplink
        keeps = traits.keeps or uplink.needs_differences
        held = dict(self.call.held)
        for answer in answers:
            client = answer.client
            if self.add(answer):
                accepted = {accepted_note(answer.task.round)} if keeps else set()
                held[client] = answer.content | accepted
            elif left := accepted_only(held, client):
                held[client] = left
            else:
                held.pop(client, None)
        return held

    def add(self, answer: Answer) -> bool:
        """Fold in the answer of a member; whether it was accepted."""
        client, judged = answer.client, answer.judged
        self.asked[client] = answer.task.seats or 1
        if judged.verdict.code != Code.NO_ANSWER:
            self.answered += len(judged.members) or 1
        self._judge(client, judged.verdict)
        for name, own in judged.members.items():
            self._judge(name, own.verdict)
        if judged.reply is None:
            return False
        if judged.reply.clients and not judged.reply.bundle:
            return self._absorb(answer)
        for name, own in (judged.members or {client: judged}).items():
            if own.reply is None or self._over(name):
                continue
            if self.call.federation.config.secure_sum:  # its update is in the sum
                self._count(client, name, own, 1)
                continue
            self.staleness.append(self.call.number - answer.task.round)
            power = self.call.federation.config.staleness_power
            weight = buffer.weight(own.reply.num_examples, self.staleness[-1], power)
            self.aggregator.add(own.update, weight)
            self._count(client, name, own, 1)
        return True

    def _absorb(self, answer: Answer) -> bool:
        """Fold in a partial aggregate."""
        reply, partial = answer.judged.reply, summable(self.aggregator)
        like = answer.expected.like
        if reply is None or partial is None or like is None:
            return False
        try:
            partial.absorb(answer.judged.update, float(reply.num_examples), like)
        except ValueError as error:
            self._judge(answer.client, Verdict(Code.FORM, str(error)))
            return False
        self._count(answer.client, answer.client, answer.judged, reply.clients)
        return True

    def _over(self, name: str) -> bool:
        """Judges a client that may not take part now; returns whether that is so.

        A gateway cannot know which of its devices may not.
        """
        why = self.spending.refusal(name, self.call.number)
        if why:
            self._judge(name, Verdict(Code.BUDGET, why))
        return bool(why)

    def _judge(self, name: str, verdict: Verdict) -> None:
        self.verdicts[name] = verdict
        if not verdict.accepted:
            self.dropped[name] = verdict.why

    def _count(self, member: str, name: str, judged: Judged, updates: int) -> None:
        if judged.reply is not None:
            self.examples[name] = judged.reply.num_examples
            self.metrics[name] = judged.reply.metrics
            self.updates[member] = self.updates.get(member, 0) + updates


def empty_fold(call: RoundCall, spending: Spending) -> Fold:
    """Nothing is folded in yet: the aggregator is as strategy, robust rule and privacy have it."""
    strategy = call.federation.strategy
    defence, clipped = defence_of(call), None
    if spending.level is not None:
        like = expectations.first_like(call.federation, call.number)
        clipped = spending.level.aggregator(strategy.aggregator, call.memory, like)
    return Fold(call, spending, defence or clipped or strategy.aggregator(), defence, clipped)
