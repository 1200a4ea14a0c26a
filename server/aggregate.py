"""From packets to an aggregate: replies in order, each checked before it can touch the model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from corolla import tree, wire
from corolla.compression import PLAIN, Pipeline
from corolla.errors import WireError
from corolla.types import Payload
from corolla.wire import Packet, Reply, Task, unpack_reply

_FRAMING = 1 << 20
"""Room for the safetensors header and for a quarter more than the tensors, at least."""


_ABSURD = 1e6
"""No honest change of a factor is as large; one such value would end everybody's training."""


def in_order(
    answers: Iterable[tuple[str, Packet | None]], clients: Sequence[str]
) -> Iterator[tuple[str, Packet | None]]:
    """The answers in the order of `clients`, each as soon as all before it are known.

    None stands for no answer. Strangers and second answers are dropped: nobody counts twice.
    """
    waiting: dict[str, Packet | None] = {}
    left = list(clients)
    for client, packet in answers:
        if client in left and client not in waiting:
            waiting[client] = packet
        while left and left[0] in waiting:
            yield left[0], waiting.pop(left.pop(0))
    for client in left:
        yield client, waiting.get(client)


def read_reply(
    packet: Packet,
    client: str,
    task: Task,
    like: Payload | None,
    codec: Pipeline = PLAIN,
) -> tuple[Reply, Payload]:
    """A reply and its update, checked against the task it answers and what an update looks like.

    `codec` is how it travelled; `like` is None where no payload is expected. Raises WireError for
    an error reply, a stale or foreign one, a payload that differs in names, shapes or types, and
    values that are not finite.
    """
    expected = codec.content_bytes(like)[0] if like is not None else 0
    reply = unpack_reply(packet, max_payload=expected + expected // 4 + _FRAMING)
    if (reply.run_id, reply.kind, reply.client) != (task.run_id, task.kind, client):
        raise WireError("reply belongs to another run, task or client")
    if (reply.round, reply.base_version) != (task.round, task.base_version):
        raise WireError(f"reply is stale: it answers round {reply.round}, not {task.round}")
    if reply.error or reply.missing:
        return reply, {}
    if like is None:
        return reply, {}
    if reply.num_examples < 1:
        raise WireError("reply has no examples")
    payload = codec.unpack(wire.content(reply), like)
    _same_form(payload, like)
    return reply, payload


def _same_form(payload: Payload, like: Payload) -> None:
    if payload.keys() != like.keys():
        raise WireError(f"update has groups {sorted(payload)}, expected {sorted(like)}")
    for group, params in like.items():
        found: Mapping[str, torch.Tensor] = payload[group]
        if found.keys() != params.keys():
            odd = sorted(found.keys() ^ params.keys())
            raise WireError(f"update differs in {len(odd)} tensors of {group!r}, first {odd[0]!r}")
        for name, tensor in params.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise WireError(
                    f"update tensor {name!r} is {found[name].dtype} {tuple(found[name].shape)}, "
                    f"expected {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.dim() == 0 and not _equal(found[name], tensor):
                raise WireError(
                    f"update has {name} {float(found[name]):g} in {group!r}, not {float(tensor):g}"
                )
            if not tensor.is_floating_point() and not _within(found[name], tensor):
                raise WireError(
                    f"update tensor {name!r} of {group!r} is not between 0 and {int(tensor.max())}"
                )
        if not tree.finite(found):
            raise WireError(f"update has values in {group!r} that are not finite")
        values = [tensor for tensor in found.values() if tensor.is_floating_point()]
        if any(bool((tensor.abs() > _ABSURD).any()) for tensor in values):
            raise WireError(f"update has values in {group!r} beyond {_ABSURD:.0e}")


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Exactly; a real number up to what another machine's rounding may change."""
    tolerance = 1e-5 * abs(float(wanted)) if wanted.is_floating_point() else 0.0
    return abs(float(found) - float(wanted)) <= tolerance  # never for NaN


def _within(found: torch.Tensor, limits: torch.Tensor) -> bool:
    return bool(((found >= 0) & (found <= limits)).all())
