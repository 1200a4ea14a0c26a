"""Outsiders that hold the places of others with calls that are answered, or never whole.

Four addresses may have all connections of a front. Where one that was answered, or has sent a part
of a request, keeps its place, those four keep all others out for a few bytes a minute.
"""

import http.client
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from corolla.host import certificates
from corolla.host.occupancy import Occupancy
from corolla.server.deployment.connections import SHARE
from tests.server.deployment.test_front import Upstream, built_in, upstream

__all__ = ["upstream"]

PLACES = 4 * SHARE


class Victim:
    """A front with few places, and how it is called."""

    def __init__(self, address: str, ca: Path) -> None:
        self.address, self.tls = address, ssl.create_default_context(cafile=str(ca))

    def held(self, source: str, whole: bool) -> http.client.HTTPSConnection:
        """A connection that was answered, or whose request lacks its last byte."""
        own = http.client.HTTPSConnection(
            self.address, timeout=60, context=self.tls, source_address=(source, 0)
        )
        own.putrequest("POST", "/v1/fleet/get-run")
        own.putheader("content-length", "2")
        own.endheaders(b"ab" if whole else b"a")
        if whole:
            assert own.getresponse().read() == b"ab"
        return own

    def status(self) -> int | None:
        """The status of an honest call; None where there is no answer."""
        url = f"https://{self.address}/v1/fleet/get-run"
        try:
            return httpx.post(url, verify=self.tls, timeout=60, trust_env=False).status_code
        except httpx.TransportError:
            return None


@pytest.fixture
def victim(upstream: Upstream, tmp_path: Path) -> Iterator[Victim]:
    certificates.make(tmp_path / "outer", [])
    inner = tmp_path / "inner" / "ca.pem"
    with built_in(tmp_path / "outer", int(upstream.server_address[1]), inner) as (address, made):
        made.server._most = PLACES
        yield Victim(address, tmp_path / "outer" / "ca.pem")


@contextmanager
def held(victim: Victim, whole: bool) -> Iterator[None]:
    """All places, by connections of four addresses of this machine."""
    with ExitStack() as stack:
        for number in range(PLACES):
            own = victim.held(f"127.0.0.{2 + number % SHARE}", whole)
            stack.callback(own.close)
        yield


@pytest.mark.parametrize("whole", [True, False], ids=["answered", "a part of a request"])
def test_connections_that_wait_for_their_callers_keep_nobody_out(
    victim: Victim, whole: bool
) -> None:
    with held(victim, whole):
        for _ in range(3):
            assert victim.status() == 200


@pytest.mark.parametrize("whole", [True, False], ids=["answered", "a part of a request"])
def test_where_they_keep_their_places_nobody_else_is_heard(
    victim: Victim, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Occupancy, "wait", Occupancy.settle)
    with held(victim, whole):
        assert victim.status() is None
