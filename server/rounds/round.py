"""One round is one function: the same in process, in Flower's simulation and on devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from corolla.aggregation import robust
from corolla.errors import RoundError
from corolla.interfaces import Stacking
from corolla.models.sparse import carried
from corolla.server.rounds import secure
from corolla.server.rounds.asking import (
    Asking,
    answer_of,
    gather,
)
from corolla.server.rounds.call import RoundCall, RoundEvents
from corolla.server.rounds.defence import norms_after
from corolla.server.rounds.expectations import completed
from corolla.server.rounds.federation import Held
from corolla.server.rounds.fold import Fold, empty_fold
from corolla.server.rounds.metrics import mean_metrics, simulated_seconds, staleness
from corolla.server.rounds.network import Network
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.tasks import Traffic, costs, formula, trained
from corolla.server.rounds.verdicts import Code, Verdict
from corolla.strategies.listing import registry
from corolla.tensors import tree
from corolla.types import Cost, Metrics, Payload
from corolla.wire.messages import Kind


@dataclass(frozen=True)
class RoundResult:
    """The state after a round and the facts about it."""

    state: Payload
    held: Held
    metrics: Metrics
    num_examples: Mapping[str, int]
    """Client → weight of its valid update; a gateway → weight of all updates that it has merged.

    It is empty with dp=client, as is `client_loss`.
    """
    client_loss: Metrics
    dropped: Mapping[str, str]
    traffic: Traffic
    cost: Cost
    """The Cost of these clients by the strategy's formula; `once` is not in it.

    With dp=client it is of the clients that are asked; where these are secret, the mean over all
    cohorts that may be drawn.
    """
    sampling_probability: float
    """Of each reachable client, their mean if selection is weighted; the part of the federation
    that is at work at a time, if updates are buffered."""
    verdicts: Mapping[str, Verdict]
    """The verdicts on all replies, also on those that a gateway passes on in a bundle."""
    asked: int
    """How many updates were asked for."""
    updates: int
    """How many were folded in, those that gateways have merged included."""
    answered: int
    """How many replies came, whatever they were like."""
    sim_seconds: float | None = None
    memory: Payload = field(default_factory=dict)


@dataclass(frozen=True)
class _Release:
    """The results that the server learns of all updates together."""

    aggregate: Payload
    memory: Payload = field(default_factory=dict)
    """Groups that replace groups of the server's memory."""
    metrics: Metrics = field(default_factory=dict)


def run_round(
    call: RoundCall,
    network: Network,
    spending: Spending | None = None,
    events: RoundEvents | None = None,
) -> RoundResult:
    """Broadcast, let the cohort train, aggregate valid replies in the order of ids, apply.

    `spending` is the account of differential privacy. Commits or leaves everything as it was:
    raises RoundError, with the verdicts, when fewer than the quorum are valid, or when the
    aggregate is not finite.
    """
    config, events = call.federation.config, events or RoundEvents()
    asking = Asking(call, network, spending or Spending(config), events)
    secure.begin(call, network)
    gathered = gather(asking)
    fold = empty_fold(call, asking.spending)
    held = fold.add_all(gathered.answers)
    summed = secure.end(call, network, fold, asking.traffic)
    try:
        _require_quorum(fold, gathered.wanted)
        release = _release(fold, events)
        state, applied = _applied(fold, release.aggregate)
    except RoundError as error:
        error.verdicts = dict(fold.verdicts)
        raise
    secret = fold.clipped is not None or summed is not None
    losses = {c: own["train_loss"] for c, own in fold.metrics.items() if "train_loss" in own}
    metrics = [
        {} if secret else mean_metrics(fold.metrics, fold.examples),
        applied,
        staleness(config, fold.staleness),
        fold.defence.metrics if fold.defence else {},
        release.metrics,
        secure.metrics(summed),
    ]
    norms = norms_after(call, fold.defence) if fold.defence else {}
    return RoundResult(
        state=state,
        held=held,
        metrics={name: value for own in metrics for name, value in own.items()},
        num_examples={} if secret else fold.examples,
        client_loss={} if secret else losses,
        dropped=dict.fromkeys(fold.dropped, "") if fold.clipped else fold.dropped,
        traffic=asking.traffic,
        cost=_cost(fold),
        sampling_probability=gathered.probability,
        verdicts=fold.verdicts,
        asked=gathered.wanted,
        updates=sum(fold.updates.values()),
        answered=fold.answered,
        sim_seconds=simulated_seconds(config, asking.traffic, fold.examples, fold.dropped),
        memory={**gathered.memory, **release.memory, **norms, **secure.memory(summed)},
    )


def _require_quorum(fold: Fold, wanted: int) -> None:
    """Raises RoundError when fewer updates are valid than the quorum, or a robust rule, needs."""
    federation, spending, round = fold.call.federation, fold.spending, fold.call.number
    config, valid = federation.config, sum(fold.updates.values())
    if spending.poisson:
        if fold.call.last:
            return
        # Who is away was as good as not drawn; of the others, errors count.
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
    reasons = sorted(fold.dropped.items(), key=lambda item: "lower lr" not in item[1])
    client, why = next(iter(reasons), ("", "none was asked"))
    raise RoundError(
        f"round {round}: {valid} of {wanted} clients gave a valid update, {needed} are needed; "
        f"{client}: {why}"
    )


def _release(fold: Fold, events: RoundEvents) -> _Release:
    """The aggregate, with dp=client under noise. Raises RoundError when there can be none."""
    call, spending = fold.call, fold.spending
    try:
        if fold.clipped is not None and spending.level is not None:
            clients = sorted(fold.examples)
            return _Release(
                *spending.level.release(
                    fold.clipped, clients, call.memory, events.note, round=call.number
                )
            )
        aggregate = completed(call.federation, fold.aggregator.finalise())
        if spending.config.dp == "none":
            return _Release(aggregate)
        events.note(spending.hear(fold.metrics))
    except ValueError as error:
        raise RoundError(f"round {call.number}: {error}") from error
    return _Release(aggregate, metrics={"epsilon": spending.most})


def _applied(fold: Fold, aggregate: Payload) -> tuple[Payload, Metrics]:
    """The state after the aggregate, of rank at most `max_rank`.

    Raises RoundError when it is not finite.
    """
    federation = fold.call.federation
    strategy, most = federation.strategy, federation.config.max_rank
    before, support = carried.apart(fold.call.state)
    state, metrics = strategy.apply(before, aggregate)
    if not all(tree.finite(params) for params in state.values()):
        how = "lower clip" if fold.clipped else "lower lr"
        raise RoundError(f"round {fold.call.number}: the aggregate is not finite: {how}")
    if most and isinstance(strategy, Stacking):
        state, cut = strategy.cut(state, most)
        metrics = {**metrics, **cut}
    return {**state, **support}, metrics


def _cost(fold: Fold) -> Cost:
    """By the strategy's formula; with dp=client it does not depend on what was folded in."""
    federation, state, round = fold.call.federation, fold.call.state, fold.call.number
    if fold.spending.level is None:
        return formula(costs(federation, state, round, fold.updates))
    chance = fold.spending.probability
    if chance is None:
        return formula(costs(federation, state, round, fold.asked))
    everyone = formula(costs(federation, state, round, dict.fromkeys(federation.clients, 1)))
    up, down = (int(chance * of_all) for of_all in (everyone.up, everyone.down))
    return replace(everyone, up=up, down=down)


def evaluate_clients(call: RoundCall, network: Network) -> dict[str, Metrics]:
    """The global model's scores on up to `eval_clients` clients' own held-out examples.

    After the last round of a personal strategy all clients that have trained are asked, whoever is
    measured: a client saves its model when it evaluates it.
    """
    online, measured = network.online(), call.federation.evaluated
    asked = set(measured)
    personal = registry.traits(call.federation.strategy).personal
    if personal and call.number > call.federation.config.rounds:
        asked |= trained(call.held) - call.federation.seats.keys()
    members = dict.fromkeys(sorted(asked & set(online)), 1)
    if not members:
        return {}
    asking = Asking(call, network, Spending(call.federation.config))
    answers = (answer_of(asking, *answer) for answer in asking(members, Kind.EVALUATE))
    return {
        answer.client: {**reply.metrics, "examples": reply.num_examples}
        for answer in answers
        if (reply := answer.judged.reply) is not None
        and "loss" in reply.metrics
        and answer.client in measured
    }
