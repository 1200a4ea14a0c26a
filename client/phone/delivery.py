"""Delivery of a session's reply, and what the device keeps of the log after the answer to it."""

from corolla.client.phone.channel import Caller, SlowCallError
from corolla.client.phone.kept import Kept
from corolla.client.phone.meter import SessionOverError
from corolla.host.text import one_line
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.wire.packet import Packet

_SMALLEST = 1 << 16
"""Bytes of a chunk on the slowest line."""
_MOST_STUCK = 10
"""Chunks that may bring an upload no further."""
_LAST_MINUTE = 60.0
"""Seconds after the deadline in which a report may still come."""


def deliver(caller: Caller, lease: str, packet: Packet, deadline: float) -> pb.Acknowledgement:
    """Upload and report, until there is an answer or the round is long over.

    Raises SessionOverError when the gateway does not take the reply.
    """
    size, at, stuck, sent, most = len(packet.payload), 0, 0, 0, protocol.CHUNK
    while at < size:
        if caller.clock.now() > deadline:
            raise SessionOverError("the round is over")
        chunk = protocol.chunk(packet.payload[at : at + most], at, size, lease)
        sent += len(chunk.content)
        try:
            status = caller.call(caller.stub.Upload, chunk, deadline, slow=most > _SMALLEST)
        except SlowCallError:
            most //= 2
            continue
        if status.problem:
            raise SessionOverError(one_line(status.problem, protocol.MAX_TEXT))
        stuck += status.received <= at
        if status.received > size or stuck > _MOST_STUCK or sent > 3 * size + 8 * protocol.CHUNK:
            raise SessionOverError("the gateway does not take the update in")
        at = status.received
    request = pb.ReportRequest(lease=lease, reply=packet.header)
    report, until = caller.stub.Report, deadline + _LAST_MINUTE
    found: pb.Acknowledgement = caller.last_word(report, request, until)
    return found


def settle(kept: Kept, task: update_pb2.Task, packet: Packet, answer: pb.Acknowledgement) -> str:
    """Keeps what a device holds of the log after the gateway's last word; that word in a line."""
    if answer.accepted:
        if task.HasField("log"):
            kept.keep_log_version(task.log.version)
        return "accepted"
    if protocol.read_reply(packet).missing:  # this device has forgotten something
        kept.forget_log_version()
    return f"not accepted: {one_line(answer.why, protocol.MAX_TEXT)}"
