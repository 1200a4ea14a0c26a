"""One round is one function: the same in process, in Flower's simulation and on devices."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from corolla.aggregation import robust
from corolla.aggregation.robust import Robust
from corolla.aggregation.sums import summable
from corolla.config.run import RunConfig
from corolla.errors import RoundError
from corolla.interfaces import Aggregator
from corolla.privacy.clipped_sum import ClippedSum
from corolla.server.rounds import buffer, simulated_time
from corolla.server.rounds.asking import Answer, Asking, Plan, answer_of, buffered, synchronous
from corolla.server.rounds.federation import Federation, Held, Network
from corolla.server.rounds.gate import Code, Judged, Verdict
from corolla.server.rounds.spending import Spending, told
from corolla.server.rounds.tasks import Traffic, accepted_note, accepted_only, costs, formula
from corolla.strategies import registry
from corolla.tensors import tree
from corolla.types import Cost, Metrics, Payload
from corolla.wire.messages import Kind

_NORMS = "norms"
"""The group of a server's memory with the median norm of the updates of each round."""

_SCALARS = ("scalars", "zero_scalars", "skipped_scalars")


@dataclass(frozen=True)
class RoundResult:
    """The state after a round and the facts about it; bytes are payload, framing apart."""

    state: Payload
    held: Held
    metrics: Metrics
    num_examples: Mapping[str, int]
    """Who gave a valid update → its weight; a gateway for all that it has merged. With dp=client
    nothing, as below."""
    client_loss: Metrics
    dropped: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    framing_up: int
    framing_down: int
    cost: Cost
    """What the strategy's formula says for these clients; `once` is not in it. With dp=client for
    those that are asked; where that is secret, the mean over all cohorts that may be drawn."""
    sampling_probability: float
    """Of each reachable client, their mean if selection is weighted; the part of the federation
    that is at work at a time, if updates are buffered."""
    verdicts: Mapping[str, Verdict]
    """What became of every reply, also of those that a gateway passes on in a bundle."""
    asked: int
    """How many updates were asked for."""
    updates: int
    """How many were folded in, those that gateways have merged included."""
    answered: int
    """How many replies came, whatever they were like."""
    sim_seconds: float | None = None
    memory: Payload = field(default_factory=dict)


def run_round(
    federation: Federation,
    state: Payload,
    held: Held,
    round: int,
    network: Network,
    on_reply: Callable[[str], None] = lambda client: None,
    memory: Payload | None = None,
    *,
    attempt: int = 0,
    cohort: Mapping[str, int] | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    spending: Spending | None = None,
    note: Callable[[Mapping[str, Any]], None] = lambda event: None,
    last: bool = False,
) -> RoundResult:
    """Broadcast, let the cohort train, aggregate valid replies in the order of ids, apply.

    `memory` is what the server remembers beside the strategy's state. Another `attempt` draws
    another cohort; `cohort` is one that was drawn before (member → updates to ask for) and is asked
    again. `on_plan` hears who will be asked before anything is sent. `spending` is the account of
    differential privacy; `note` gets what a release costs before its noise is drawn. In the `last`
    attempt at a round of a secret cohort, who fails was as good as not drawn: the same cohort would
    be asked for ever.

    Commits or leaves everything as it was: raises RoundError, with the verdicts, when fewer than
    the quorum are valid, or when the aggregate is not finite.
    """
    config, strategy = federation.config, federation.strategy
    traffic, spending, memory = Traffic(), spending or Spending(federation.config), memory or {}
    asking = Asking(
        federation, state, held, round, network, on_reply, on_plan, attempt, traffic, spending
    )
    gathered = buffered(asking, memory) if config.buffer else synchronous(asking, memory, cohort)
    keeps = registry.traits(strategy).keeps or config.uplink.needs_differences
    known = dict(held)
    defence, summed = (
        _defence(federation, round, memory),
        _clipped(federation, round, spending, memory),
    )
    fold = _Fold(federation, defence or summed or strategy.aggregator(), spending)
    for answer in gathered.answers:
        client = answer.client
        if fold(answer, round):
            accepted = {accepted_note(answer.task.round)} if keeps else set()
            known[client] = answer.content | accepted
        elif left := accepted_only(known, client):
            known[client] = left
        else:
            known.pop(client, None)
    try:
        if not (last and spending.poisson):
            _require_quorum(federation, round, gathered.wanted, fold, spending)
        try:
            aggregate, kept, said = _released(fold, summed, round, memory, note)
        except ValueError as error:
            raise RoundError(f"round {round}: {error}") from error
        after, applied = strategy.apply(state, aggregate)
        if not all(tree.finite(params) for params in after.values()):
            how = "lower clip" if summed else "lower lr"
            raise RoundError(f"round {round}: the aggregate is not finite: {how}")
    except RoundError as error:
        error.verdicts = dict(fold.verdicts)
        raise
    return RoundResult(
        state=after,
        held=known,
        metrics={
            **({} if summed else mean_metrics(fold.metrics, fold.examples)),
            **applied,
            **_staleness(config, fold.staleness),
            **(defence.metrics if defence else {}),
            **said,
        },
        num_examples={} if summed else fold.examples,
        client_loss={}
        if summed
        else {c: m["train_loss"] for c, m in fold.metrics.items() if "train_loss" in m},
        dropped=dict.fromkeys(fold.dropped, "") if summed else fold.dropped,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        framing_up=traffic.framing_up,
        framing_down=traffic.framing_down,
        cost=_cost(federation, state, round, fold),
        sampling_probability=gathered.probability,
        verdicts=fold.verdicts,
        asked=gathered.wanted,
        updates=sum(fold.updates.values()),
        answered=fold.answered,
        sim_seconds=_sim_seconds(config, traffic, fold.examples, fold.dropped),
        memory={
            **gathered.memory,
            **kept,
            **(_norms(federation, round, defence, memory) if defence else {}),
        },
    )


@dataclass
class _Fold:
    """The updates of a round, folded in one after another, and what is said of each."""

    federation: Federation
    aggregator: Aggregator
    spending: Spending
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

    def __call__(self, answer: Answer, round: int) -> bool:
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
            if own.reply is None or self._over(name, round):
                continue
            self.staleness.append(round - answer.task.round)
            power = self.federation.config.staleness_power
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

    def _over(self, name: str, round: int) -> bool:
        """Whether a client may not take part now; a gateway cannot know which of its devices."""
        why = self.spending.refusal(name, round)
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


def _require_quorum(
    federation: Federation, round: int, wanted: int, fold: _Fold, spending: Spending
) -> None:
    """Raises RoundError when fewer updates are valid than the quorum, or a robust rule, needs."""
    config, valid = federation.config, sum(fold.updates.values())
    if spending.poisson:  # who is away was as good as not drawn; of the others, errors count
        wanted = sum(verdict.code != Code.NO_ANSWER for verdict in fold.verdicts.values())
    elif federation.own_devices:
        # Of devices that are offline, those of the cohort that were not asked are missing too.
        wanted = max(wanted, config.cohort or 0)
    needed = federation.quorum(wanted)
    if config.robust != "none":
        hostile = robust.hostile(valid, config.byzantine)
        needed = max(needed, robust.least(config.robust, hostile))
    if valid >= needed:
        return
    if spending.level:
        raise RoundError(f"round {round}: too few clients gave a valid update")
    # Who diverged says more than who was silent.
    told = sorted(fold.dropped.items(), key=lambda item: "lower lr" not in item[1])
    client, why = next(iter(told), ("", "none was asked"))
    raise RoundError(
        f"round {round}: {valid} of {wanted} clients gave a valid update, {needed} are needed; "
        f"{client}: {why}"
    )


def _cost(federation: Federation, state: Payload, round: int, fold: _Fold) -> Cost:
    """By the strategy's formula; with dp=client it does not depend on what was folded in."""
    if fold.spending.level is None:
        return formula(costs(federation, state, round, fold.updates))
    chance = fold.spending.probability
    if chance is None:
        return formula(costs(federation, state, round, fold.asked))
    everyone = formula(costs(federation, state, round, dict.fromkeys(federation.clients, 1)))
    up, down = (int(chance * of_all) for of_all in (everyone.up, everyone.down))
    return replace(everyone, up=up, down=down)


def _clipped(
    federation: Federation, round: int, spending: Spending, memory: Payload
) -> ClippedSum | None:
    """The sum that noise can be put on; None without dp=client."""
    if spending.level is None:
        return None
    return spending.level.aggregator(
        federation.strategy.aggregator, memory, _like(federation, round)
    )


def _released(
    fold: _Fold,
    summed: ClippedSum | None,
    round: int,
    memory: Payload,
    note: Callable[[Mapping[str, Any]], None],
) -> tuple[Payload, Payload, Metrics]:
    """The aggregate, what replaces groups of the server's memory, and what is said of it."""
    spending = fold.spending
    if summed is not None and spending.level is not None:
        return spending.level.release(summed, sorted(fold.examples), memory, note, round=round)
    aggregate = fold.aggregator.finalise()
    if spending.config.dp == "none":
        return aggregate, {}, {}
    event = spending.hear(told(fold.metrics))
    note(event)
    return aggregate, {}, {"epsilon": spending.most}


def _defence(federation: Federation, round: int, memory: Payload) -> Robust | None:
    """What stands before the strategy's aggregator, with the norms of earlier rounds like this."""
    config = federation.config
    if config.robust == "none":
        return None
    kept = memory.get(_NORMS, {}).get(_phase(federation, round))
    history = () if kept is None else kept.tolist()
    space = config.compared_in(federation.strategy)
    make = federation.strategy.aggregator
    return Robust(config.robust, make, space, config.byzantine, history)


def _norms(federation: Federation, round: int, defence: Robust, memory: Payload) -> Payload:
    own = {_phase(federation, round): torch.tensor(defence.history)}
    return {_NORMS: {**memory.get(_NORMS, {}), **own}}


def _phase(federation: Federation, round: int) -> str:
    """A name for the tensors that this round's updates have: other ones are of another size."""
    like = _like(federation, round)
    names = [f"{group}/{name}" for group in sorted(like) for name in sorted(like[group])]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _like(federation: Federation, round: int) -> Payload:
    """The form of the first client's update."""
    client = next(iter(federation.clients))
    fresh = federation.fresh(federation.lora(client))
    return federation.strategy.update_like(fresh, federation.size(client, round))


def evaluate_clients(
    federation: Federation, state: Payload, held: Held, round: int, network: Network
) -> dict[str, Metrics]:
    """The global model's scores on up to `eval_clients` clients' own held-out examples."""
    online = network.online()
    members = {client: 1 for client in federation.evaluated if client in online}
    if not members:
        return {}
    asking = Asking(
        *(federation, state, held, round, network),
        *(lambda client: None, lambda plan: None, 0, Traffic(), Spending(federation.config)),
    )
    answers = (answer_of(asking, *answer) for answer in asking(members, Kind.EVALUATE))
    return {
        answer.client: {**reply.metrics, "examples": reply.num_examples}
        for answer in answers
        if (reply := answer.judged.reply) is not None and "loss" in reply.metrics
    }


def mean_metrics(metrics: Mapping[str, Metrics], examples: Mapping[str, int]) -> Metrics:
    """Example-weighted means of what clients report; tokens, steps and skips are summed.

    Of epsilon it is the largest: a client is promised what it was told, whatever others were.
    """
    summed = ("target_tokens", "local_steps", "skipped", *_SCALARS)
    names = sorted({name for reported in metrics.values() for name in reported})
    result: dict[str, float] = {}
    for name in names:
        values = {c: m[name] for c, m in metrics.items() if name in m}
        if name == "epsilon":
            result[name] = max(values.values())
        elif name in summed:
            result[name] = math.fsum(values.values())
        else:
            weighted = math.fsum(value * examples[c] for c, value in values.items())
            result[name] = weighted / sum(examples[c] for c in values)
    return result


def _staleness(config: RunConfig, found: Sequence[int]) -> Metrics:
    """How many steps of the server updates were behind, where they can be."""
    if not config.buffer:
        return {}
    return {"staleness": sum(found) / len(found), "staleness_max": float(max(found))}


def _sim_seconds(
    config: RunConfig, traffic: Traffic, examples: Mapping[str, int], dropped: Mapping[str, str]
) -> float | None:
    """Simulated seconds of a round; None where time is not simulated."""
    if not config.simulates_time:
        return None
    taken = [traffic.took[client] for client in examples]
    return simulated_time.round_seconds(config, taken, missing=bool(dropped))
