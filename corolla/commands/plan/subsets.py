"""Bytes of a run that trains other tensors in each round: who receives what, round by round."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from corolla import seeds
from corolla.interfaces import Choosing
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.tasks import costs
from corolla.strategies import offset
from corolla.tensors import factors, tree
from corolla.types import Cost, Params, Payload
from corolla.wire import messages

_FOLLOWED = 200
"""Rounds that are followed: later ones are taken to cost as much as the last of these."""


def rounds(federation: Federation, strategy: Choosing) -> Iterator[tuple[int, Sequence[Cost]]]:
    """(how often, the costs of a cohort), where nobody is away of those that are drawn.

    A client receives the units that were trained since it took part last. Changes of tensors are
    not known before: with `choose=change` the blocks of a round are others, of the same number.
    """
    state = _first(federation)
    number, everyone = federation.config.rounds, list(federation.clients)
    trained: dict[str, int] = {}
    here: dict[str, int] = {}
    for round in range(1, min(number, _FOLLOWED) + 1):
        cohort = federation.sample(everyone, federation.cohort_size, round)
        sent = federation.strategy.broadcast(state)
        sizes = {group: 4 * tree.count(own) for group, own in sent.cached.items()}
        told = messages.content_bytes(sent.payload)
        one = costs(federation, state, round, dict.fromkeys(cohort, 1))
        paid = []
        for client, cost in zip(cohort, one, strict=True):
            lacks = [unit for unit in sizes if trained.get(unit, 0) >= here.get(client, 0)]
            down = told + sum(sizes[unit] for unit in lacks)
            paid.append(replace(cost, down=down, once=0))
            here[client] = round
        yield (1 if round < _FOLLOWED else number - round + 1), paid
        trained |= dict.fromkeys(strategy.chosen(state), round)
        state, _ = federation.strategy.apply(state, {"adapter": {}})


def _first(federation: Federation) -> Payload:
    """The state before the first round; nothing of it is sent that clients can make themselves."""
    config, start = federation.config, federation.fresh(federation.config.lora)
    begun = offset.planned(config.begins.offset, start)
    fresh: Params = {}
    if config.start == "random":
        shapes = {
            m: (len(start[m + factors.B]), start[m + factors.A].shape[1])
            for m in factors.modules(start)
        }
        fresh = factors.fresh(shapes, config.rank, seeds.derive(config.seed, "init"))
    return {**federation.strategy.init({**start, **fresh}, config.seed), **begun}
