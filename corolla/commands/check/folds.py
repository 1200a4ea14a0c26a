"""The last round again, from its updates alone: as other cohorts, in other orders and groups."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from corolla import seeds
from corolla.aggregation.sums import summable
from corolla.commands.check import oracle
from corolla.commands.check.findings import Finding, Proof, Worst
from corolla.commands.check.probe import Probe, Round, shares
from corolla.commands.check.tables import ORDERS, REGROUPED, TREES, WEIGHTINGS, Weighting
from corolla.interfaces import Aggregator, Observed, Summable
from corolla.strategies.listing import registry
from corolla.tensors import factors, tree
from corolla.types import LoraSpec, Params, Payload
from corolla.wire import codec

Rows = Sequence[Weighting]
Tree = int | Sequence["Tree"]
"""The number of a member, or what one gateway merges."""

_NO_SUMS = ("step", "seed", "directions")
"""Tensors of updates that say where scalars belong: nothing of them is averaged."""


@dataclass(frozen=True)
class Member:
    """One update of a cohort: what was sent, with what weight, and what its sender's model was."""

    name: str
    client: str
    """The client of the last round that it is a copy of."""
    payload: Payload
    weight: float
    trained: Params
    deltas: Params
    lora: LoraSpec


class Fold:
    """The state before the last round, as a restart reads it, and updates to fold into it.

    `regrouped` are the cohorts that are folded in other orders and groups.
    """

    def __init__(self, probe: Probe, rounds: Sequence[Round], regrouped: Rows = REGROUPED) -> None:
        self.probe, self.last, self.regrouped = probe, rounds[-1], regrouped
        self.before = [round.observed for round in rounds[:-1]]
        self.state = codec.decode(codec.encode(self.last.state))
        self.members = [
            self._member(client, client, float(n))
            for client, n in self.last.result.num_examples.items()
        ]

    def cohort(self, row: Weighting) -> list[Member]:
        """The members of a row of WEIGHTINGS."""
        if not row.weights:
            return self.members
        found = []
        for number, weight in enumerate(row.weights):
            own = self.members[number % len(self.members)]
            found.append(replace(own, name=f"{own.client}-{number}", weight=float(weight)))
        return found + [self._still(number) for number in range(row.still)]

    def aggregated(self, members: Sequence[Member]) -> Payload:
        """Their aggregate, folded in one by one."""
        aggregator = self.probe.strategy.aggregator()
        for member in members:
            aggregator.add(member.payload, member.weight)
        return aggregator.finalise()

    def applied(self, aggregate: Payload) -> Payload:
        """The state after an aggregate."""
        return self.probe.strategy.apply(self.state, aggregate)[0]

    def after(self, members: Sequence[Member]) -> Payload:
        """The state after these members, folded in one by one."""
        return self.applied(self.aggregated(members))

    def observed(self, members: Sequence[Member]) -> Observed:
        """The round as if these members had been its cohort."""
        return replace(
            self.last.observed,
            trained={m.name: m.trained for m in members},
            weights=shares({m.name: m.weight for m in members}),
            lora={m.name: m.lora for m in members},
            updates={m.name: m.payload for m in members},
        )

    def error(self, members: Sequence[Member]) -> float:
        """The error of the state after these members against what the strategy claims."""
        deltas = {m.name: m.deltas for m in members}
        seen = [*self.before, self.observed(members)]
        return oracle.errors(self.probe, self.after(members), seen, deltas)[0]

    def distance(self, one: Payload, other: Payload) -> float:
        """How far two states are apart: as models, and where coordinates are fixed as they are."""
        found = self.apart(one, other)
        traits = registry.traits(self.probe.strategy)
        if not (traits.individual or traits.rebases):
            groups = [oracle.relative(one[group], own) for group, own in other.items() if own]
            found = max([found, *groups])
        return found

    def moved_apart(self, one: Payload, other: Payload) -> float:
        """How far two aggregates move the state apart."""
        if tree.digest_all(one) == tree.digest_all(other):
            return 0.0
        return self.distance(self.applied(one), self.applied(other))

    def apart(self, one: Payload, other: Payload) -> float:
        """How far two states are apart as models."""
        if tree.digest_all(one) == tree.digest_all(other):
            return 0.0
        found = oracle.relative(self.probe.deltas(one), self.probe.deltas(other))
        if registry.traits(self.probe.strategy).personal:
            adapters = [self.probe.strategy.adapter(state).trained for state in (one, other)]
            found = max(found, oracle.relative(*adapters))
        return found

    def _member(self, name: str, client: str, weight: float) -> Member:
        seen = self.last.observed
        return Member(
            name,
            client,
            seen.updates[client],
            weight,
            seen.trained[client],
            self.last.deltas[client],
            seen.lora[client],
        )

    def _still(self, number: int) -> Member:
        """A client that trained nothing: its update is zero, its model that of the server."""
        own = self.members[(number + 1) % len(self.members)]
        own = replace(own, name=f"still-{number}", weight=4.0, deltas=self.probe.deltas(self.state))
        seen, updates = self.last.observed, registry.traits(self.probe.strategy).updates
        if updates in ("differences", "scalars"):
            trained = {n: seen.start.get(n, t) for n, t in own.trained.items()}
            return replace(own, payload=_zero(own.payload), trained=trained)
        payload = {
            group: {n: t if factors.is_a(n) else t * 0 for n, t in params.items()}
            for group, params in own.payload.items()
        }
        trained = {n: t * 0 if factors.is_b(n) else t for n, t in own.trained.items()}
        trained |= factors.select(seen.start, factors.is_head)
        return replace(own, payload=payload, trained=trained)


def _zero(payload: Payload) -> Payload:
    return {
        group: {n: t if n in _NO_SUMS else t * 0 for n, t in params.items()}
        for group, params in payload.items()
    }


def proofs(fold: Fold) -> Iterator[Proof]:
    """All that must hold whatever the cohort is."""
    strategy = fold.probe.strategy
    if oracle.claim_of(strategy) != "nothing":
        yield "weights = examples", lambda: by_examples(fold)
    if getattr(strategy, "weighted", True):
        yield "shares alone count", lambda: only_shares(fold)
        yield "every weight counts", lambda: each_counts(fold)
    yield "order", lambda: order(fold)
    yield "grouping", lambda: grouping(fold)
    if summable(strategy.aggregator()) is not None:
        yield "partial sums", lambda: partial_sums(fold)
    if strategy.aggregator().linear:
        yield "linear as declared", lambda: linear(fold)
    yield "server half is pure", lambda: pure(fold)


# --- weights --------------------------------------------------------------------------------------


def by_examples(fold: Fold) -> Finding:
    """Clients count by their examples, or by the shares that are claimed: against dense sums."""
    stale, worst = registry.traits(fold.probe.strategy).stale, Worst()
    for row in WEIGHTINGS:
        if stale or not row.fractions:
            worst.see(fold.error(fold.cohort(row)), row.name)
    limit = oracle.limit_of(fold.probe.strategy)
    return worst.finding("weights = examples", fold.probe.kind, limit)


def only_shares(fold: Fold) -> Finding:
    """Checks that shares alone count: weights scaled, an update in parts, one of little weight."""
    worst = Worst()
    for row in fold.regrouped:
        own = fold.cohort(row)
        wanted = fold.after(own)
        more = [replace(m, weight=m.weight * 1000) for m in own]
        worst.see(fold.apart(fold.after(more), wanted), f"{row.name}, weights times 1000")
        first, others = own[0], own[1:]
        parts = [replace(first, weight=w * first.weight) for w in (1, 2, 1)]
        four = replace(first, weight=4 * first.weight)
        apart = fold.apart(fold.after([*parts, *others]), fold.after([four, *others]))
        worst.see(apart, f"{row.name}, the update of {first.name} in three parts")
        large = [replace(m, weight=m.weight * 3e6) for m in others]
        apart = fold.apart(fold.after([replace(first, weight=1.0), *large]), fold.after(others))
        worst.see(apart, f"{row.name}, {first.name} with next to no weight")
    limit = oracle.limit_of(fold.probe.strategy)
    return worst.finding("shares alone count", fold.probe.kind, limit)


def each_counts(fold: Fold) -> Finding:
    """Twice the examples of any client must move the aggregate."""
    wanted, idle = fold.after(fold.members), []
    for number, member in enumerate(fold.members):
        more = list(fold.members)
        more[number] = replace(member, weight=3 * member.weight)
        if not fold.apart(fold.after(more), wanted) > oracle.limit_of(fold.probe.strategy):
            idle.append(member.client)
    note = f"weights of {', '.join(idle)} change nothing" if idle else ""
    return Finding("every weight counts", fold.probe.kind, float(len(idle)), 0.0, note)


# --- orders and groups ----------------------------------------------------------------------------


def order(fold: Fold) -> Finding:
    """Clients in any order give the same: reversed, two of them swapped, shuffled."""
    worst = Worst()
    for row in fold.regrouped:
        members = fold.cohort(row)
        wanted = fold.aggregated(members)
        for places in _orders(len(members), seeds.generator(0, row.name)):
            found = fold.aggregated([members[i] for i in places])
            names = ", ".join(members[i].name for i in places)
            worst.see(fold.moved_apart(found, wanted), f"{row.name} in the order {names}")
    return worst.finding("order", fold.probe.kind, oracle.EXACT)


def grouping(fold: Fold) -> Finding:
    """Merging partial aggregates in any tree gives what adding one by one gives."""
    worst = Worst()
    for row in fold.regrouped:
        members = fold.cohort(row)
        wanted = fold.aggregated(members)
        for each in _trees(len(members), seeds.generator(0, row.name)):
            found = _merged(fold, members, each).finalise()
            worst.see(fold.moved_apart(found, wanted), f"merged as {_said(each, members)}")
    return worst.finding("grouping", fold.probe.kind, oracle.EXACT)


def partial_sums(fold: Fold) -> Finding:
    """Sums that gateways send, as bytes, give what adding one by one gives; and sums add up."""
    worst = Worst()
    for form in _forms(fold.members):
        wanted = fold.aggregated(form)
        for each in _trees(len(form), seeds.generator(0, len(form))):
            found = _absorbed(fold, form, each).finalise()
            worst.see(fold.moved_apart(found, wanted), f"sums of gateways as {_said(each, form)}")
        whole, parts = _sums(fold, form), [_sums(fold, [member]) for member in form]
        for group, params in whole.items():
            for name, tensor in params.items():
                added = torch.stack([part[group][name].double() for part in parts]).sum(0)
                apart = oracle.relative({name: tensor.double()}, {name: added})
                worst.see(apart, f"sums of {len(form)} clients do not add up in {group}/{name}")
    return worst.finding("partial sums", fold.probe.kind, oracle.EXACT)


def linear(fold: Fold) -> Finding:
    """Checks that a linear aggregate stays the same when all clients send their weighted mean."""
    worst = Worst()
    for form in _forms(fold.members):
        if any(n in params for params in form[0].payload.values() for n in _NO_SUMS):
            continue  # scalars of different directions have no mean; their sums do
        p = shares({m.name: m.weight for m in form})
        mean = {
            group: {
                n: torch.stack([p[m.name] * m.payload[group][n].double() for m in form])
                .sum(0)
                .to(t)
                for n, t in params.items()
            }
            for group, params in form[0].payload.items()
        }
        found = fold.after([replace(m, payload=mean) for m in form])
        apart = oracle.relative(fold.probe.deltas(found), fold.probe.deltas(fold.after(form)))
        worst.see(apart, f"{len(form)} clients that all send their mean")
    return worst.finding(
        "linear as declared", fold.probe.kind, oracle.limit_of(fold.probe.strategy)
    )


def pure(fold: Fold) -> Finding:
    """Nothing that is given to the server half is changed by it, and it remembers nothing."""
    payloads = {m.name: m.payload for m in fold.members}
    before = [tree.digest_all(own) for own in (fold.state, *payloads.values())]
    aggregate = fold.aggregated(fold.members)
    digest = tree.digest_all(aggregate)
    first = fold.applied(aggregate)
    fold.probe.strategy.broadcast(first)
    fold.probe.strategy.adapter(first)
    after = [tree.digest_all(own) for own in (fold.state, *payloads.values())]
    names = ["the state", *(f"the update of {name}" for name in payloads)]
    changed = [name for name, was, now in zip(names, before, after, strict=True) if was != now]
    changed += ["the aggregate"] if tree.digest_all(aggregate) != digest else []
    again = fold.distance(fold.after(fold.members), fold.last.result.state)
    if not again <= oracle.EXACT:
        changed.append("something beside the state: the same round gave another result")
    note = f"changed: {', '.join(changed)}" if changed else ""
    return Finding("server half is pure", fold.probe.kind, float(len(changed)), 0.0, note)


def _forms(members: Sequence[Member]) -> list[list[Member]]:
    """Members whose updates have the same form: only such can be summed up together."""
    kinds: dict[str, list[Member]] = {}
    for member in members:
        shapes = {
            (group, name, tuple(tensor.shape))
            for group, params in member.payload.items()
            for name, tensor in params.items()
        }
        kinds.setdefault(repr(sorted(shapes)), []).append(member)
    return list(kinds.values())


def _orders(count: int, draw: torch.Generator) -> list[list[int]]:
    places = list(range(count))
    found = [places[::-1], places[1:] + places[:1]]
    for one, other in ((0, 1), (0, count - 1), (count // 2, count - 1)):
        swapped = places.copy()
        swapped[one], swapped[other] = swapped[other], swapped[one]
        found.append(swapped)
    return found + [torch.randperm(count, generator=draw).tolist() for _ in range(ORDERS)]


def _trees(count: int, draw: torch.Generator) -> list[Tree]:
    """Each alone, one and the rest, halves of unlike size, and random ones of any depth."""
    places = list(range(count))
    found: list[Tree] = [[[i] for i in places], [0, places[1:]], [places[:1], places[1:]]]
    found += [[places[:2], places[2:]], [[], places[: count - 1], [[], places[count - 1 :]]]]
    shuffled = [torch.randperm(count, generator=draw).tolist() for _ in range(TREES)]
    return found + [_grown(places, draw) for places in shuffled]


def _grown(places: Sequence[int], draw: torch.Generator) -> Tree:
    """A random tree: cut in two or three, and each part again."""
    if len(places) < 3:
        return list(places)
    cuts = sorted({int(torch.randint(1, len(places), (), generator=draw)) for _ in range(2)})
    edges = itertools.pairwise([0, *cuts, len(places)])
    return [_grown(places[start:stop], draw) for start, stop in edges]


def _leaves(each: Tree) -> list[int]:
    return [each] if isinstance(each, int) else [leaf for part in each for leaf in _leaves(part)]


def _said(each: Tree, members: Sequence[Member]) -> str:
    if isinstance(each, int):
        return members[each].name
    return "(" + " ".join(_said(part, members) for part in each) + ")"


def _merged(fold: Fold, members: Sequence[Member], each: Tree) -> Aggregator:
    """Every list is an aggregator that the others are merged into."""
    aggregator = fold.probe.strategy.aggregator()
    for part in [each] if isinstance(each, int) else each:
        if isinstance(part, int):
            aggregator.add(members[part].payload, members[part].weight)
        else:
            aggregator.merge(_merged(fold, members, part))
    return aggregator


def _absorbed(fold: Fold, members: Sequence[Member], each: Tree) -> Summable:
    """Every list is a gateway that sends its sums to the next one as bytes."""
    aggregator = _summable(fold)
    for part in [each] if isinstance(each, int) else each:
        if isinstance(part, int):
            aggregator.add(members[part].payload, members[part].weight)
        elif leaves := _leaves(part):
            sums = codec.decode(codec.encode(_absorbed(fold, members, part).sums()))
            weight = sum(members[leaf].weight for leaf in leaves)
            aggregator.absorb(sums, weight, members[leaves[0]].payload)
    return aggregator


def _sums(fold: Fold, members: Sequence[Member]) -> Mapping[str, Params]:
    aggregator = _summable(fold)
    for member in members:
        aggregator.add(member.payload, member.weight)
    return aggregator.sums()


def _summable(fold: Fold) -> Summable:
    found = summable(fold.probe.strategy.aggregator())
    if found is None:
        raise TypeError("an aggregator is summable at one time and not at another")
    return found
