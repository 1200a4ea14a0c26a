"""Expectations of valid replies from the members of a federation."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from corolla.aggregation import robust
from corolla.aggregation.sums import summable
from corolla.config.run import RunConfig
from corolla.interfaces import Strategy, Summable, Tallied
from corolla.models import layers
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.verdicts import Expected
from corolla.strategies.listing import registry
from corolla.sums import vectors
from corolla.sums.quantise import Quantiser
from corolla.tensors import factors
from corolla.types import Payload
from corolla.wire.messages import Kind


def expected(
    federation: Federation, member: str, kind: Kind, round: int, seats: int = 1
) -> Expected:
    """Returns the Expected of a member's reply to a task; `seats` is of a gateway's task."""
    if kind != Kind.TRAIN:
        return Expected(None)
    if federation.config.secure_sum:
        return Expected(None, most_examples=0, masked=masked_bytes(federation, round))
    names = federation.classes_of(member)
    if member not in federation.seats:
        return _of_class(federation, member, round, names[0])
    likes = [like(federation, member, round, name) for name in names]
    bundle = replace(
        _of_class(federation, member, round, names[0]),
        like=_joined(likes),
        most_examples=most_examples(federation, member),
        most_clients=seats,
        member=lambda phone: [_of_class(federation, member, round, name, phone) for name in names],
    )
    partial, of_class = federation.partial, dict(zip(names, likes, strict=True))
    return bundle if partial is None else _of_sums(federation, member, partial, bundle, of_class)


def like(federation: Federation, member: str, round: int, kind: str, phone: str = "") -> Payload:
    """The form of the update of a member, or its phone, of a class."""
    fresh = federation.fresh(federation.lora(member))
    whole = federation.strategy.update_like(fresh, federation.size(member, round, phone, kind))
    return sent(federation.config, federation.strategy, kind, whole)


def sent(config: RunConfig, strategy: Strategy, kind: str, whole: Payload) -> Payload:
    """The form of an update of a class, of the form that it has where all blocks are trained."""
    leaves_out = registry.traits(strategy).partial == "absent"
    return layers.sent(whole, config.of_class(kind).layers) if leaves_out else whole


def completed(federation: Federation, aggregate: Payload) -> Payload:
    """An aggregate with no change of blocks that nobody has trained in the round."""
    config, strategy = federation.config, federation.strategy
    if registry.traits(strategy).partial != "absent" or not config.partial:
        return aggregate
    fresh = federation.fresh(config.lora)
    whole = strategy.update_like(fresh, factors.size(fresh))
    stacked = registry.traits(strategy).updates == "factors"
    return {
        group: {
            **{n: _still(n, t, stacked) for n, t in whole[group].items() if n not in own},
            **own,
        }
        for group, own in aggregate.items()
    }


def _still(name: str, tensor: Tensor, stacked: bool) -> Tensor:
    """No change of a tensor; of factors that are stacked, those of rank 0."""
    if not stacked:
        return torch.zeros_like(tensor)
    return tensor[:0] if factors.is_a(name) else tensor[:, :0]


def first_like(federation: Federation, round: int) -> Payload:
    """The form of the first member's update, where one form stands for those of all."""
    member = next(iter(federation.clients))
    return like(federation, member, round, federation.class_of(member))


def masked_bytes(federation: Federation, round: int) -> int:
    """Bytes of the vector that a member gives to a secure sum; 0 where there are no sums."""
    partial = summable(federation.strategy.aggregator())
    return (
        4 * Quantiser(1.0, 1, vectors.count(partial.sums_like(first_like(federation, round)))).size
        if partial
        else 0
    )


def most_examples(federation: Federation, member: str) -> int:
    """The most examples a client, or a phone, can have used: a claim is its update's weight."""
    names = federation.classes_of(member)
    return max(_most_examples(federation, member, name) for name in names)


def _of_class(
    federation: Federation, member: str, round: int, name: str, phone: str = ""
) -> Expected:
    """The reply of one client, or phone of a gateway, of a class."""
    return Expected(
        like(federation, member, round, name, phone),
        federation.config.uplink,
        _most_examples(federation, member, name),
        federation.config.max_norm,
        space=robust.space_of(registry.traits(federation.strategy)),
    )


def _of_sums(
    federation: Federation,
    gateway: str,
    partial: Summable,
    bundle: Expected,
    likes: Mapping[str, Payload],
) -> Expected:
    """A partial aggregate of a gateway instead of a bundle; `likes` are the forms of each class."""
    parts: dict[frozenset[str], int] = {}
    for name, form in likes.items():
        groups = frozenset(partial.sums_like(form))
        parts[groups] = max(_most_examples(federation, gateway, name), parts.get(groups, 0))
    return replace(
        bundle,
        sums=partial.sums_like(_joined(likes.values())),
        parts=parts,
        tally=partial.tally if isinstance(partial, Tallied) else None,
    )


def _most_examples(federation: Federation, member: str, kind: str) -> int:
    own, examples = federation.config.of_class(kind), federation.clients[member]
    if own.local_epochs is not None:
        return examples
    most = own.local_steps * own.batch_size
    return most if member in federation.seats else min(examples, most)


def _joined(likes: Iterable[Payload]) -> Payload:
    """The groups of all: those of several classes that may have taken part."""
    return {group: params for like in likes for group, params in like.items()}
