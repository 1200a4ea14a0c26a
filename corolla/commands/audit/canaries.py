"""Canaries: clients, or examples, that are there or not by the toss of a coin, and easy to trace.

Random directions as updates of clients: Andrew et al., "One-shot Empirical Privacy Estimation for
Federated Learning", ICLR 2024, arXiv 2302.03098. Random tokens as examples: Carlini et al., "The
Secret Sharer", USENIX Security 2019, arXiv 1802.08232. Coins for all of them in one run: Steinke et
al., NeurIPS 2023, arXiv 2305.08846.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corolla import seeds
from corolla.data.rows import Example
from corolla.interfaces import Strategy
from corolla.server.rounds import expectations
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import Params, Payload
from corolla.wire import scalar_groups
from corolla.wire.envelope import Envelope
from corolla.wire.messages import Kind, Reply, pack_reply, unpack_task
from corolla.wire.packet import Packet

_TOKENS = 24
"""The most tokens of a canary example: enough to be like no other."""


def names(count: int) -> list[str]:
    """The names of canary clients, in an order that sorting keeps."""
    width = len(str(count - 1))
    return [f"canary-{i:0{width}d}" for i in range(count)]


def coins(count: int, seed: int) -> list[bool]:
    """Returns for each canary whether it is in, by fair and independent coins.

    They are apart from all else that `seed` decides.
    """
    generator = seeds.generator(seed, "audit", "coins")
    return torch.randint(2, (count,), generator=generator).bool().tolist()


@dataclass(frozen=True)
class CanaryClients(Network):
    """Clients that answer each task with an update of their own: random, and of L2 norm `norm`.

    Those that are not `included` never answer. `federation` says what an update is like. The norm
    is that of what an update adds to the strategy's aggregate: where the form of updates cannot
    carry it (scalars in half precision) it is the largest that can be.
    """

    federation: Federation
    included: Mapping[str, bool]
    norm: float
    seed: int

    def clients(self) -> Mapping[str, int]:
        return self.federation.clients

    def online(self) -> AbstractSet[str]:
        return self.federation.clients.keys()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            yield client, self._answer(client, packet) if self.included[client] else None

    def update(self, client: str, round: int) -> Payload:
        """Returns the update that a client sends in a round, the same each time it is asked for."""
        like = expectations.expected(self.federation, client, Kind.TRAIN, round).like or {}
        generator = seeds.generator(self.seed, "audit", client, round)
        drawn = {
            group: {name: _random(params[name], generator) for name in sorted(params)}
            for group, params in sorted(like.items())
        }
        weigh = self.norm / max(1e-30, _norm(contribution(self.federation.strategy, drawn)))
        for params in drawn.values():
            for tensor in filter(_free, params.values()):
                largest = torch.finfo(tensor.dtype).max / 2
                weigh = min(weigh, largest / max(1e-30, float(tensor.abs().max())))
        return {
            group: {n: t * weigh if _free(t) else t for n, t in params.items()}
            for group, params in drawn.items()
        }

    def _answer(self, client: str, packet: Packet) -> Packet | None:
        task = unpack_task(packet)
        if task.kind != Kind.TRAIN:
            return None
        expected = expectations.expected(self.federation, client, Kind.TRAIN, task.round)
        envelope = Envelope(self.federation.config.uplink)
        sealed = envelope.seal(self.update(client, task.round), self.seed)
        reply = Reply(
            *(task.run_id, task.round, task.base_version, task.kind, client),
            num_examples=expected.most_examples,
            payload=sealed.data,
            scalars=sealed.scalars,
        )
        return pack_reply(reply)


def contribution(strategy: Strategy, update: Payload) -> Payload:
    """Returns the strategy's aggregate of one client's update alone."""
    alone = strategy.aggregator()
    alone.add(update, 1.0)
    return alone.finalise()


def traced(strategy: Strategy, before: Payload, after: Payload, update: Payload) -> float:
    """How much of `update` is in the step from one released state to the next.

    The cosine-like product of what the update alone would have done with what was done: for a
    strategy whose server adds the aggregate up, that of the update with the aggregate.
    """
    alone, _ = strategy.apply(before, contribution(strategy, update))
    if turns(strategy):
        own, done = (_products(strategy, before, state) for state in (alone, after))
        return _inner(own, done) / math.sqrt(max(1e-60, _inner(own, own)))
    own, done = _moved(before, alone), _moved(before, after)
    dot = math.fsum(float((own[name] * done[name]).sum()) for name in own.keys() & done.keys())
    norm = math.sqrt(math.fsum(float(t.square().sum()) for t in own.values()))
    return dot / max(1e-30, norm)


def turns(strategy: Strategy) -> bool:
    """Returns whether factors turn from round to round: then only their products tell a change."""
    own = registry.traits(strategy)
    return own.rebases and own.updates != "scalars"


def examples(
    tokenizer: Any, labels: Sequence[str], count: int, length: int, seed: int
) -> list[Example]:
    """Canary examples of random tokens, with a random label where there are labels.

    `length` is that of the longest sequence that is trained on.
    """
    generator = seeds.generator(seed, "audit", "tokens")
    special = set(tokenizer.all_special_ids)
    known = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    tokens = max(4, min(_TOKENS, length // 2))
    drawn = known[torch.randint(len(known), (count, tokens), generator=generator)]
    classes = torch.randint(max(1, len(labels)), (count,), generator=generator).tolist()
    return [
        Example(tokenizer.decode(ids), label=labels[own] if labels else None)
        for ids, own in zip(drawn.tolist(), classes, strict=True)
    ]


def _free(tensor: Tensor) -> bool:
    """Returns whether a client chooses the tensor's values: whole and single numbers are given."""
    return tensor.is_floating_point() and tensor.dim() > 0


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if _free(like):
        return torch.randn(like.shape, generator=generator).to(like.dtype)
    if like.dim() and not like.is_floating_point():
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (drawn * (like + 1)).floor().to(like.dtype)
    return like


def _norm(payload: Payload) -> float:
    tensors = [t for params in payload.values() for t in params.values() if t.is_floating_point()]
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors))


def _moved(before: Payload, after: Payload) -> Params:
    """Returns the changes in a state, in fp64; rows of a log with their step multiplied in."""
    found: dict[str, Tensor] = {}
    for group, params in after.items():
        if params is before.get(group):
            continue
        step = (
            params["step"].double()
            if scalar_groups.is_scalars(params) and "step" in params
            else 1.0
        )
        for name, tensor in params.items():
            if tensor.is_floating_point() and tensor.dim():
                old = before.get(group, {}).get(name)
                found[f"{group}/{name}"] = tensor.double() * step - (0 if old is None else old)
    return found


def _products(strategy: Strategy, before: Payload, after: Payload) -> Params:
    """Factors of the change of the effective weights, in fp64."""
    old, new = (strategy.adapter(state).trained for state in (before, after))
    double = [{n: t.double() for n, t in p.items() if not factors.is_head(n)} for p in (new, old)]
    return factors.stack([double[0], factors.bake(double[1], -1.0)])


def _inner(one: Params, other: Params) -> float:
    """⟨B₁ A₁, B₂ A₂⟩ over all modules, from small matrices."""
    return math.fsum(
        float(
            (
                (other[m + factors.B].T @ one[m + factors.B])
                * (other[m + factors.A] @ one[m + factors.A].T)
            ).sum()
        )
        for m in factors.modules(one)
    )
