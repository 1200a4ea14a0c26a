"""The gate: one pure function that every reply passes before a strategy sees it.

Bytes are counted before they are decoded, headers are read before payloads. Whatever the bytes of a
reply are, the answer is a verdict; memory is bounded by what an honest reply would need.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto

import torch
from torch import Tensor

from corolla.aggregation import robust
from corolla.aggregation.robust import Space
from corolla.errors import NotFiniteError, SchemaError, WireError
from corolla.host import text
from corolla.tensors import factors
from corolla.types import Params, Payload
from corolla.wire import messages
from corolla.wire.compression import PLAIN, Pipeline
from corolla.wire.limits import MAX_EXAMPLES, MAX_REPLY_HEADER
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet

_ENTRY = 1 << 16
"""Bytes of an honest header, and of its place in a bundle, at most; scalars apart."""

_ABSURD = 1e6
"""No honest change of a factor is as large; one such value would end everybody's training."""

_CANCELS = 1e3
"""How many bounds the factors of a product may span: what cancels comes back as rounding."""

_ROUNDING = 1e-6
"""Of a norm that a client has clipped in float32."""

_WHY = 300


class Code(StrEnum):
    """What became of a reply."""

    ACCEPTED = auto()
    NO_ANSWER = auto()
    CLIENT_ERROR = auto()
    """The client says itself that it could not do the task."""
    MISSING = auto()
    """The client has lost cached groups."""
    MALFORMED = auto()
    """No message at all, or one that contradicts itself."""
    FOREIGN = auto()
    """Of another run, client, kind of task or base model."""
    STALE = auto()
    """Of another round or version."""
    VERSION = auto()
    """Of another schema."""
    TOO_LARGE = auto()
    FORM = auto()
    """Other groups, names, shapes or types than those of an update."""
    NOT_FINITE = auto()
    NORM = auto()
    WEIGHT = auto()
    """More examples, or fewer, than the client can have."""
    LATE = auto()
    """After the deadline: said by who keeps the time."""
    BUDGET = auto()
    """Of a client that may not take part now: said by who keeps the account of privacy."""


@dataclass(frozen=True)
class Verdict:
    """What became of a reply and why: one printable line, "" of what was accepted."""

    code: Code
    why: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the reply counts."""
        return self.code == Code.ACCEPTED


@dataclass(frozen=True)
class Expected:
    """What a valid reply to one task is like.

    `like` is the form of an update (Strategy.update_like), None where no payload is expected;
    `codec` how it travels. `most_examples` is the largest weight of one client. `max_norm` bounds
    the joint L2 norm of an update in `space` (see robust.py), where None leaves the bound of 1e6 on
    each value. With `most_clients` the reply is that of a gateway for at most so many clients: a
    partial aggregate of the form `sums` (Summable.sums_like), or without one, a bundle of replies;
    `member` says what is expected of each by name, where that is not the same of all: one form for
    each class that it can be of. `parts` are the groups of `sums` that each class adds to and the
    largest weight of one client of it, where `like` holds those of several: what is sent are the
    groups of some of the classes, or of all. `tally` reads how much of the sums is of which class
    (see Tallied), where they say so.
    """

    like: Payload | None
    codec: Pipeline = PLAIN
    most_examples: int = MAX_EXAMPLES
    max_norm: float | None = None
    sums: Payload | None = None
    most_clients: int = 0
    space: Space = "tensors"
    member: "Callable[[str], Sequence[Expected]] | None" = None
    parts: Mapping[frozenset[str], int] = field(default_factory=dict)
    tally: Callable[[Payload], Mapping[str, tuple[float, float]]] | None = None


@dataclass(frozen=True)
class Judged:
    """A verdict; of an accepted reply also the reply and its update (or partial aggregate).

    `content` counts the bytes of the values as they were sent. `members` holds the replies in a
    bundle by the name of their client, where the gateway itself has no update.
    """

    verdict: Verdict
    reply: Reply | None = None
    update: Payload = field(default_factory=dict)
    content: int = 0
    members: "Mapping[str, Judged]" = field(default_factory=dict)


class _RefusedError(Exception):
    """Ends the examination of a reply; never leaves `judge`."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


def judge(packet: Packet | None, client: str, task: Task, expect: Expected) -> Judged:
    """The verdict on what came back from `client` for `task`; None stands for no answer.

    Never raises, whatever the bytes are. A payload takes at most a few times the bytes of an honest
    one, a header (1 MiB) at most 40 MiB. A bundle is accepted when it can be read: its members have
    their own verdicts.
    """
    if packet is None:
        return _refused(Code.NO_ANSWER, "no answer")
    try:
        return _judged(packet, client, task, expect)
    except _RefusedError as refused:
        return _refused(refused.code, str(refused))
    except SchemaError as error:
        return _refused(Code.VERSION, str(error))
    except NotFiniteError as error:
        return _refused(Code.NOT_FINITE, str(error))
    except WireError as error:
        return _refused(Code.MALFORMED, str(error))


def most_bytes(expect: Expected) -> int:
    """The payload bytes a reply may have: an honest one's, a quarter more, and framing."""
    if expect.like is None:
        return 0
    if expect.sums is not None:
        return _with_framing(expect.sums, PLAIN)
    one = _with_framing(expect.like, expect.codec)
    return expect.most_clients * (one + _ENTRY) if expect.most_clients else one


def _judged(packet: Packet, client: str, task: Task, expect: Expected) -> Judged:
    limit = most_bytes(expect)
    for part, size, most in (
        ("header", len(packet.header), MAX_REPLY_HEADER),
        ("payload", len(packet.payload), limit),
    ):
        if size > most:
            raise _RefusedError(Code.TOO_LARGE, f"{part} has {size} bytes, at most {most}")
    reply = messages.unpack_reply(packet, limit)
    if (reply.run_id, reply.kind, reply.client) != (task.run_id, task.kind, client):
        raise _RefusedError(Code.FOREIGN, "reply belongs to another run, task or client")
    if (reply.round, reply.base_version) != (task.round, task.base_version):
        raise _RefusedError(
            Code.STALE, f"reply is stale: it answers round {reply.round}, not {task.round}"
        )
    if reply.missing:
        raise _RefusedError(Code.MISSING, reply.error or "cached groups are missing")
    if reply.error:
        raise _RefusedError(Code.CLIENT_ERROR, reply.error)
    if reply.model_sha256 and task.model_sha256 and reply.model_sha256 != task.model_sha256:
        raise _RefusedError(
            Code.FOREIGN,
            f"client has base model {reply.model_sha256[:8]}, not {task.model_sha256[:8]}",
        )
    if expect.like is None:
        _check_weight(reply.num_examples, 0, expect.most_examples)
        return Judged(Verdict(Code.ACCEPTED), reply)
    if (reply.clients > 0, reply.bundle) != (
        expect.most_clients > 0,
        expect.most_clients > 0 and expect.sums is None,
    ):
        raise _RefusedError(Code.FORM, _forms(expect))
    if reply.clients > expect.most_clients:
        raise _RefusedError(
            Code.WEIGHT, f"reply is of {reply.clients} clients, {expect.most_clients} were asked"
        )
    if reply.bundle:
        return _bundle(reply, task, expect)
    _check_weight(
        reply.num_examples, max(1, reply.clients), max(1, reply.clients) * expect.most_examples
    )
    wanted = expect.like if expect.sums is None else expect.sums
    found = messages.content(reply, _framing(wanted))
    content = messages.content_bytes(found)
    if expect.sums is None:
        update = expect.codec.unpack(found, expect.like)
        _check_update(update, expect.like, expect)
    else:
        update = found
        _check_sums(update, expect.sums, reply.num_examples, expect)
        _check_classes(update, reply, expect)
    return Judged(Verdict(Code.ACCEPTED), reply, update, content)


def _bundle(reply: Reply, task: Task, expect: Expected) -> Judged:
    """Every member as if it had answered itself: each name once, and that of this gateway's."""
    packets = messages.unpack_bundle(reply.payload, expect.most_clients)
    if len(packets) != reply.clients:
        raise _RefusedError(
            Code.FORM, f"bundle has {len(packets)} entries, it says {reply.clients}"
        )
    members: dict[str, Judged] = {}
    one = replace(expect, most_clients=0, sums=None, member=None, parts={}, tally=None)
    for number, packet in enumerate(packets):
        name = messages.peek_client(packet)
        # What has no name of its own still has a verdict.
        if not name.startswith(f"{reply.client}/") or not name.isprintable():
            place, judged = f"{reply.client}#{number}", _refused(Code.FOREIGN, "no such client")
        elif name in members:
            place, judged = f"{reply.client}#{number}", _refused(Code.FOREIGN, f"{name} came twice")
        else:
            own = expect.member(name) if expect.member else [one]
            place, judged = name, _of_a_class(packet, name, replace(task, seats=0), own)
        members[place] = judged
    content = sum(judged.content for judged in members.values())
    return Judged(Verdict(Code.ACCEPTED), reply, {}, content, members)


def _of_a_class(packet: Packet, client: str, task: Task, own: Sequence[Expected]) -> Judged:
    """The verdict by the class whose form the reply has; where it has none, that of the first."""
    judged = [judge(packet, client, task, expect) for expect in own]
    of_form = [found for found in judged if found.verdict.code not in (Code.FORM, Code.TOO_LARGE)]
    return next((found for found in judged if found.verdict.accepted), (of_form or judged)[0])


def _check_weight(found: int, least: int, most: int) -> None:
    if found < least:
        raise _RefusedError(Code.WEIGHT, f"reply has {found or 'no'} examples, at least {least}")
    if found > most:
        raise _RefusedError(
            Code.WEIGHT, f"reply claims {found} examples, more than it can have: {most}"
        )


def _check_update(update: Payload, like: Payload, expect: Expected) -> None:
    """The form, what is given, and the bounds of one client's update."""
    _check_form(update, like)
    for group, params in like.items():
        for name, tensor in params.items():
            found = update[group][name]
            if tensor.dim() == 0 and not _equal(found, tensor):
                raise _RefusedError(
                    Code.FORM,
                    f"update has {name} {float(found):g} in {group!r}, not {float(tensor):g}",
                )
            if not tensor.is_floating_point() and not _within(found, tensor):
                raise _RefusedError(
                    Code.FORM,
                    f"update tensor {name!r} of {group!r} is not between 0 and {int(tensor.max())}",
                )
    _check_values(update, _ABSURD)
    if expect.max_norm is None:
        return
    norm = math.sqrt(float(robust.squared_norms([update], expect.space)))
    _check_norm(norm, expect.max_norm)
    if expect.space == "products":
        own = update["factors"]
        span = math.fsum(
            float(own[m + factors.A].double().norm() * own[m + factors.B].double().norm())
            for m in factors.modules(own)
        )
        if not span <= _CANCELS * expect.max_norm:
            raise _RefusedError(
                Code.NORM, f"factors span {span:.4g} where their product is {norm:.4g}"
            )


def _check_sums(sums: Payload, like: Payload, weight: int, expect: Expected) -> None:
    """The form and the bounds of a partial aggregate: |Σ w x| ≤ Σ w · max |x|.

    Groups that an update does not have are statistics, which have no norm of their own.
    """
    came = _who_came(sums, expect.parts) or expect.parts
    groups = frozenset().union(*came) if came else like.keys()
    _check_form(sums, {group: like[group] for group in like if group in groups})
    update = expect.like or {}
    of_one = {
        group: {
            name: tensor.double() / _reach(update.get(group, {})) for name, tensor in own.items()
        }
        for group, own in sums.items()
    }
    _check_values(of_one, weight * _ABSURD)
    if expect.max_norm is not None:
        own = [tensor for group in of_one if group in update for tensor in of_one[group].values()]
        norm = math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in own))
        _check_norm(norm, weight * expect.max_norm)


def _check_classes(sums: Payload, reply: Reply, expect: Expected) -> None:
    """The weight by the classes that came: another one may have the larger limit."""
    came = _who_came(sums, expect.parts)
    if came:
        _check_weight(reply.num_examples, reply.clients, reply.clients * max(came.values()))
    if expect.tally is None:
        return
    tally = expect.tally(sums)
    counted = sum(clients for _, clients in tally.values())
    if counted != reply.clients:
        raise _RefusedError(
            Code.WEIGHT, f"reply is of {reply.clients} clients, its sums of {counted:g}"
        )
    for groups, most in came.items():
        for group in groups & tally.keys():
            examples, clients = tally[group]
            if not examples <= clients * most:
                raise _RefusedError(
                    Code.WEIGHT,
                    f"{clients:g} clients with {group!r} claim {examples:g} examples, more than "
                    f"they can have: {clients * most:g}",
                )


def _who_came(sums: Payload, parts: Mapping[frozenset[str], int]) -> Mapping[frozenset[str], int]:
    """The parts of the classes whose groups are all there."""
    return {groups: most for groups, most in parts.items() if groups <= sums.keys()}


def _reach(params: Params) -> float:
    """How much larger a move along directions can be than the scalars g (T,) that it is made of.

    |step Σ_t g_t e_{k_t}| ≤ |step| √T |g|, reached where all are along one direction.
    """
    if "step" not in params or "scalars" not in params:
        return 1.0
    return max(abs(float(params["step"])), 1e-30) * math.sqrt(max(1, len(params["scalars"])))


def _check_form(payload: Payload, like: Payload) -> None:
    if payload.keys() != like.keys():
        raise _RefusedError(
            Code.FORM, f"update has groups {sorted(payload)[:9]}, expected {sorted(like)}"
        )
    for group, params in like.items():
        found: Mapping[str, Tensor] = payload[group]
        if found.keys() != params.keys():
            odd = sorted(found.keys() ^ params.keys())
            raise _RefusedError(
                Code.FORM, f"update differs in {len(odd)} tensors of {group!r}, first {odd[0]!r}"
            )
        for name, tensor in params.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise _RefusedError(
                    Code.FORM,
                    f"update tensor {name!r} is {found[name].dtype} {tuple(found[name].shape)}, "
                    f"expected {tensor.dtype} {tuple(tensor.shape)}",
                )


def _check_values(payload: Payload, most: float) -> None:
    for group, params in payload.items():
        for tensor in params.values():
            if not tensor.is_floating_point():
                continue
            if not bool(torch.isfinite(tensor).all()):
                raise _RefusedError(
                    Code.NOT_FINITE, f"update has values in {group!r} that are not finite"
                )
            if bool((tensor.abs() > most).any()):
                raise _RefusedError(Code.NORM, f"update has values in {group!r} beyond {most:.0e}")


def _check_norm(norm: float, most: float) -> None:
    if not norm <= most * (1 + _ROUNDING):
        raise _RefusedError(Code.NORM, f"update has norm {norm:.4g}, at most {most:.4g}")


def _with_framing(like: Payload, codec: Pipeline) -> int:
    expected = codec.content_bytes(like)[0]
    return expected + expected // 4 + _framing(like)


def _framing(like: Payload) -> int:
    """Bytes of a safetensors header of this form, at most; nobody parses a longer one."""
    names = [f"{group}/{name}" for group, params in like.items() for name in params]
    groups = sum(16 + 14 * len(group) for group in like)  # JSON in JSON: \\u1234
    return 1024 + groups + sum(128 + 2 * len(name.encode()) for name in names)


def _forms(expect: Expected) -> str:
    if not expect.most_clients:
        return "reply is that of a gateway, which this client is not"
    return "gateway sent no " + ("bundle" if expect.sums is None else "partial aggregate")


def _equal(found: Tensor, wanted: Tensor) -> bool:
    """Exactly; a real number up to what another machine's rounding may change."""
    tolerance = 1e-5 * abs(float(wanted)) if wanted.is_floating_point() else 0.0
    return abs(float(found) - float(wanted)) <= tolerance  # never for NaN


def _within(found: Tensor, limits: Tensor) -> bool:
    return bool(((found >= 0) & (found <= limits)).all())


def _refused(code: Code, why: str) -> Judged:
    return Judged(Verdict(code, text.one_line(why)[:_WHY]))
