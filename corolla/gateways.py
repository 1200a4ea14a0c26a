"""`corolla gateway`: the SuperNode of a client, with a gateway in its trainer's place."""

import sys
from collections.abc import Sequence
from pathlib import Path

from corolla import calls, certs
from corolla.client.node import Node, Say, only_one
from corolla.client.own import identity
from corolla.client.supernode import Link
from corolla.errors import ConfigError, WireError
from corolla.server.gateway import Settings
from corolla.server.gateway_daemon import Order
from corolla.server.leases import Policy
from corolla.server.tokens import read_tokens

_POLICY = ("charging", "unmetered", "idle")


def order(
    *,
    name: str,
    state: Path,
    listen: str,
    certificate: Path,
    key: Path,
    tokens: Path,
    share_model: Path | None,
    policy: str,
    over_select: float,
    seats: int,
    retry: float,
    lease: float,
    allow: Sequence[str],
) -> Order:
    """The options of `corolla gateway`, checked. Raises ConfigError."""
    try:
        calls.check_device(name)
    except WireError as error:
        raise ConfigError(f"--name {name!r}: {error}") from error
    calls.check_address("--listen", listen)
    asked = [] if policy in ("", "none") else policy.split(",")
    unknown = [word for word in asked if word not in _POLICY]
    if unknown:
        raise ConfigError(
            f"--policy {unknown[0]!r} is not known: choose from {', '.join(_POLICY)}, or none"
        )
    files = [path.expanduser().absolute() for path in (certificate, key, tokens)]
    certs.check_pair(*files[:2])
    read_tokens(files[2])
    settings = Settings(
        name=name,
        state=state.expanduser().absolute(),
        policy=Policy(**{word: word in asked for word in _POLICY}),
        over_select=over_select,
        seats=seats,
        retry=retry,
        lease=lease,
        share_model=share_model.expanduser().absolute() if share_model else None,
        allow=tuple(allow),
    )
    return Order(settings, listen, *files)


def begin(server: str, root_certificates: Path | None, order: Order, say: Say) -> None:
    """Be a gateway until a signal. Raises CorollaError for what its owner must change first."""
    calls.check_address("--server", server)
    own = order.gateway
    key, _ = identity(own.state)
    link = Link(server, root_certificates, own.name, own.state, key)
    daemon = [sys.executable, "-m", "corolla.server.gateway_daemon"]
    with only_one(own.state):
        Node(link, daemon, order.to_json(), say).run()
