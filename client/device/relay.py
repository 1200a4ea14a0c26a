"""The thin ClientApp: carries a packet to the trainer on this device and its answer back.

Flower starts a process for each message; torch and a model would cost it many seconds, so they
live in a daemon (client/device/daemon.py) behind a unix socket. This module imports neither.

Run as `flwr-clientapp` (see client/device/supernode.py) it also leaves aside the code that a server
sends along with a run: what a device executes is what its owner has installed.
"""

import argparse
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from corolla.errors import CorollaError, PeerError, WireError
from corolla.phones import protocol
from corolla.proto import update_pb2
from corolla.wire import rpc
from corolla.wire.packet import Packet, from_flower, to_flower

_LARGEST = 2 << 30
_TRIES = 2
"""A task on which the trainer has died twice is not tried a third time."""
_LEFT = 5.0
"""Seconds, or a tenth of what there is, for the answer's own way back."""

app = ClientApp()  # without annotation: `flwr build` looks for the bare assignment


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Every kind of task: what is asked stands in the packet's header."""
    told, own = message.metadata, context.node_config
    seconds = told.created_at + told.ttl - time.time()
    try:
        packet = from_flower(message.content, _LARGEST)
        reply = carry(packet, Path(str(own["socket"])), seconds, str(own["name"]))
    except CorollaError as error:
        reply = error_reply(Packet(b"", b""), str(error), str(own["name"]))
    return Message(to_flower(reply), reply_to=message)


def carry(packet: Packet, socket: Path, seconds: float, name: str) -> Packet:
    """The trainer's answer within `seconds`, else a reply of `name` that says why there is none.

    A trainer that starts, or starts again, is waited for while there is time.
    """
    seconds = max(0.1, seconds - min(_LEFT, 0.1 * seconds))
    deadline = time.monotonic() + seconds
    why = ""
    for _ in range(_TRIES):
        try:
            return rpc.ask_trainer(socket, packet, max(0.1, deadline - time.monotonic()))
        except PeerError as error:
            why = str(error)
            if not error.gone or time.monotonic() > deadline:
                break
    return error_reply(packet, why, name)


def error_reply(packet: Packet, why: str, name: str) -> Packet:
    """A reply of client `name` that echoes the task's header, as pack_reply would make it."""
    try:
        task = protocol.read_task(packet.header)
    except WireError:
        task = update_pb2.Task()
    return protocol.given_up(task, name, why)


def main() -> None:
    """`flwr-clientapp` for one message, with this app in place of the bundle's.

    Flower's own command is not imported: its package brings the databases of SuperNodes, which
    would double what a message costs a device.
    """
    from flwr.common.args import try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime import run_clientapp

    # Both names are Flower's own (1.41): tests/client/device/test_relay.py holds them.
    vars(run_clientapp).update(
        install_from_fab=lambda *_, **__: None,
        get_load_client_app_fn=lambda *_, **__: lambda *_: app,
    )
    told = parser().parse_args()
    run_clientapp.run_clientapp(
        runtime_api_address=told.runtime_api_address,
        token=try_obtain_flwr_app_token(told),
        insecure=told.insecure,
        certificates=validate_and_resolve_root_certificates(told.root_certificates, told.insecure),
        parent_pid=told.parent_pid,
        runtime_dependency_install=told.runtime_dependency_install,
    )


def parser() -> argparse.ArgumentParser:
    """The arguments of Flower's `flwr-clientapp`."""
    from flwr.common.args import add_args_flwr_app_common
    from flwr.supercore.constant import SUPERNODE_DEFAULT_CLIENT_ADDRESS

    made = argparse.ArgumentParser(description="Run a Flower ClientApp")
    made.add_argument("--runtime-api-address", default=SUPERNODE_DEFAULT_CLIENT_ADDRESS)
    add_args_flwr_app_common(made)
    return made


if __name__ == "__main__":
    main()
