"""The gate: one pure function that every reply passes before a strategy sees it.

Bytes are counted before they are decoded, headers are read before payloads. Whatever the bytes of a
reply are, the answer is a verdict; memory is bounded by what an honest reply would need.
"""

from collections.abc import Sequence
from dataclasses import replace

from corolla.errors import NotFiniteError, SchemaError, WireError
from corolla.host import text
from corolla.server.rounds import gate_checks
from corolla.server.rounds.gate_checks import RefusedError
from corolla.server.rounds.verdicts import Code, Expected, Judged, Verdict
from corolla.types import Payload
from corolla.wire import limits, messages
from corolla.wire.compression import PLAIN, Pipeline
from corolla.wire.envelope import Envelope, value_bytes
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet

_ENTRY = 1 << 16
"""Bytes of an honest header, and of its place in a bundle, at most; scalars apart."""

_WHY = 300


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
    except RefusedError as refused:
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
        ("header", len(packet.header), limits.MAX_REPLY_HEADER),
        ("payload", len(packet.payload), limit),
    ):
        if size > most:
            raise RefusedError(Code.TOO_LARGE, f"{part} has {size} bytes, at most {most}")
    reply = messages.unpack_reply(packet, limit)
    gate_checks.check_answers(reply, client, task)
    if expect.like is None:
        gate_checks.check_weight(reply.num_examples, 0, expect.most_examples)
        return Judged(Verdict(Code.ACCEPTED), reply, content=expect.masked)
    gate_checks.check_sender(reply, expect)
    if reply.bundle:
        return _bundle(reply, task, expect)
    gate_checks.check_weight(
        reply.num_examples, max(1, reply.clients), max(1, reply.clients) * expect.most_examples
    )
    steps, wanted = (expect.codec, expect.like) if expect.sums is None else (PLAIN, expect.sums)
    update = Envelope(steps).open(reply, wanted, _framing(wanted))
    content = value_bytes(reply.payload, reply.scalars)
    if expect.sums is None:
        gate_checks.check_update(update, expect.like, expect)
    else:
        gate_checks.check_sums(update, expect.sums, reply.num_examples, expect)
        gate_checks.check_classes(update, reply, expect)
    return Judged(Verdict(Code.ACCEPTED), reply, update, content)


def _bundle(reply: Reply, task: Task, expect: Expected) -> Judged:
    """Every member as if it had answered itself: each name once, and that of this gateway's."""
    packets = messages.unpack_bundle(reply.payload, expect.most_clients)
    if len(packets) != reply.clients:
        raise RefusedError(Code.FORM, f"bundle has {len(packets)} entries, it says {reply.clients}")
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


def _with_framing(like: Payload, codec: Pipeline) -> int:
    expected = codec.content_bytes(like)[0]
    return expected + expected // 4 + _framing(like)


def _framing(like: Payload) -> int:
    """Bytes of a safetensors header of this form, at most; nobody parses a longer one."""
    names = [f"{group}/{name}" for group, params in like.items() for name in params]
    groups = sum(16 + 14 * len(group) for group in like)  # JSON in JSON: \\u1234
    return 1024 + groups + sum(128 + 2 * len(name.encode()) for name in names)


def _refused(code: Code, why: str) -> Judged:
    return Judged(Verdict(code, text.one_line(why)[:_WHY]))
