"""`corolla gateway`: the SuperNode of a client, with a gateway in its trainer's place."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corolla.client.device.identity import identity
from corolla.client.device.node import Node, Say, only_one
from corolla.client.device.supernode import Link
from corolla.errors import ConfigError, WireError
from corolla.host import certificates
from corolla.host.processes import bypass_proxies
from corolla.host.text import parse_bytes
from corolla.phones import protocol
from corolla.server.gateway.access import read_tokens
from corolla.server.gateway.daemon import GatewayOrder
from corolla.server.gateway.settings import GatewaySettings, Policy
from corolla.wire.limits import MAX_EXAMPLES

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
"""Unit of a time in --policy → seconds."""


def _whole(text: str, least: int, most: int) -> int:
    if not least <= (found := int(text)) <= most:
        raise ValueError
    return found


def _percent(text: str) -> float:
    if not 0 < (found := float(text)) <= 100:
        raise ValueError
    return found


def _bytes(text: str) -> int:
    return _whole(str(parse_bytes(text)), 1, 1 << 62)


def _seconds(text: str) -> float:
    number = text.rstrip("smhd")
    if not 0 < (found := float(number) * _UNITS.get(text[len(number) :], math.nan)) < 1e9:
        raise ValueError
    return found


_YES = ("charging", "unmetered", "idle")
_VALUES: Mapping[str, tuple[str, Callable[[str], int | float], str]] = {
    "battery": ("battery_percent", lambda text: _whole(text, 1, 100), "percent, 1 to 100"),
    "thermal": ("thermal", lambda text: _whole(text, 1, 6), "1 (light) to 6 (shutdown)"),
    "storage": ("storage_bytes", _bytes, "bytes, as 100MB"),
    "examples": ("examples", lambda text: _whole(text, 1, MAX_EXAMPLES), "a number, 1 or more"),
    "separation": ("separation", lambda text: _whole(text, 1, 1 << 31), "rounds, 1 or more"),
    "period": ("period_seconds", _seconds, "a time, as 90m, 24h or 7d"),
    "daily-bytes": ("daily_bytes", _bytes, "bytes, as 50MB"),
    "daily-seconds": ("daily_seconds", _seconds, "seconds, or as 30m"),
    "daily-battery": ("daily_battery_percent", _percent, "percent, up to 100"),
}
"""Word of --policy → (field of Policy, what reads its value and raises ValueError, what it is)."""


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """The options of `corolla gateway` that decide what it is, as they are given."""

    name: str
    state: Path
    listen: str
    certificate: Path
    key: Path
    tokens: Path
    share_model: Path | None
    share_bundle: Path | None
    publisher: Path | None
    policy: str
    over_select: float
    seats: int
    retry: float
    lease: float
    allow: Sequence[str]


def order(options: GatewayOptions) -> GatewayOrder:
    """Returns the gateway process's order. Raises ConfigError for options that make no sense."""
    try:
        protocol.check_device(options.name)
    except WireError as error:
        raise ConfigError(f"--name {options.name!r}: {error}") from error
    protocol.check_address("--listen", options.listen)
    if options.publisher and not options.share_bundle:
        raise ConfigError("--publisher is for --share-bundle: give both, or leave it out")
    given = (options.certificate, options.key, options.tokens)
    certificate, key, tokens = (path.expanduser().absolute() for path in given)
    certificates.check_pair(certificate, key)
    read_tokens(tokens)
    settings = GatewaySettings(
        name=options.name,
        state=options.state.expanduser().absolute(),
        policy=read_policy(options.policy),
        over_select=options.over_select,
        seats=options.seats,
        retry=options.retry,
        lease=options.lease,
        share_model=_absolute(options.share_model),
        share_bundle=_absolute(options.share_bundle),
        publisher=_absolute(options.publisher),
        allow=tuple(options.allow),
    )
    return GatewayOrder(settings, options.listen, certificate, key, tokens)


def read_policy(text: str) -> Policy:
    """Returns the policy for phones in --policy: words, some with a value. Raises ConfigError."""
    found: dict[str, bool | int | float] = dict.fromkeys(_YES, False)
    for entry in [] if text in ("", "none") else text.split(","):
        word, given, value = entry.strip().partition("=")
        if word in _YES and not given:
            found[word] = True
            continue
        if word not in _VALUES:
            words = ", ".join([*_YES, *(f"{known}=…" for known in _VALUES)])
            raise ConfigError(f"--policy {entry!r} is not known: choose from {words}, or none")
        name, read, what = _VALUES[word]
        try:
            found[name] = read(value.strip())
        except ValueError as error:
            raise ConfigError(f"--policy {word}: expected {what}; found {value!r}") from error
    return Policy(**found)  # type: ignore[arg-type]


def _absolute(path: Path | None) -> Path | None:
    return path.expanduser().absolute() if path else None


def begin(server: str, root_certificates: Path | None, order: GatewayOrder, say: Say) -> None:
    """Be a gateway until a signal. Raises CorollaError for what its owner must change first."""
    protocol.check_address("--server", server)
    bypass_proxies()
    own = order.gateway
    key, _ = identity(own.state)
    link = Link(server, root_certificates, own.name, own.state, key)
    daemon = [sys.executable, "-m", "corolla.server.gateway.daemon"]
    with only_one(own.state):
        Node(link, daemon, order.to_json(), say).run()
