"""An outsider who wants through the front to Control, which asks nobody who they are.

It writes what it likes on the socket: paths that mean another, two requests in one, headers that
cannot go on, old TLS. Behind the front is a server that records what reaches it.
"""

import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corolla.host import certificates
from corolla.server.deployment import front as front_module
from corolla.server.deployment.front import Front
from tests.server.deployment.test_front import Door, Upstream, built_in, raw

START = "POST /v1/fleet/get-run HTTP/1.1\r\n"
HIDDEN = b"POST /v1/control/list-runs HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
PATHS = {
    "control": "/v1/control/list-runs",
    "runtime": "/v1/runtime/get-nodes",
    "dots": "/v1/fleet/../control/list-runs",
    "encoded dots": "/v1/fleet/%2e%2e/control/list-runs",
    "encoded slash": "/v1/fleet/..%2fcontrol%2flist-runs",
    "double slash": "//v1/control/list-runs",
    "absolute": "https://127.0.0.1:1/v1/control/list-runs",
    "semicolon": "/v1/fleet/get-run;/../control/list-runs",
    "case": "/v1/fleet/GET-RUN",
    "nul": "/v1/fleet/get-run%00",
    "newline": "/v1/fleet/get-run%0d%0aX:1",
    "beyond ASCII": "/v1/fleet/get-rún",
    "root": "/",
}
FRAMED = {
    "two lengths": (f"content-length: {5 + len(HIDDEN)}\r\ntransfer-encoding: chunked\r\n", 400),
    "twice a length": ("content-length: 5\r\ncontent-length: 0\r\n", 400),
    "unknown coding": ("transfer-encoding: xchunked\r\n", 400),
    "two codings": ("transfer-encoding: gzip, chunked\r\n", 400),
    "negative": ("content-length: -1\r\n", 400),
    "25 digits": (f"content-length: {'9' * 25}\r\n", 400),
    "huge": ("content-length: 99999999999\r\n", 413),
    "folded": ("flwr-public-key: a\r\n b\r\ncontent-length: 0\r\n", None),
    "header beyond ASCII": ("flwr-public-key: ÿþ<script>\r\ncontent-length: 0\r\n", 400),
    "other header beyond ASCII": ("x: ÿ\r\ncontent-length: 0\r\n", 400),
    "no length of digits": ("content-length: ²\r\n", 400),
    "large header": (f"x: {'a' * (1 << 20)}\r\n", 400),
}


@contextmanager
def served(folder: Path) -> Iterator[tuple[Door, Upstream, Front]]:
    """A front before a server that records."""
    for name in ("inner", "outer"):
        certificates.make(folder / name, [])
    upstream = Upstream(folder / "inner")
    thread = threading.Thread(target=upstream.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    port = int(upstream.server_address[1])
    try:
        with built_in(folder / "outer", port, folder / "inner" / "ca.pem") as (address, front):
            yield Door(address), upstream, front
    finally:
        upstream.shutdown()
        thread.join()
        upstream.server_close()


def reached(upstream: Upstream) -> set[str]:
    return {path for _, path, _, _ in upstream.seen}


def test_no_path_leads_past_fleet(tmp_path: Path) -> None:
    with served(tmp_path) as (door, upstream, _):
        for name, path in PATHS.items():
            status, _ = raw(door, f"POST {path} HTTP/1.1\r\ncontent-length: 0\r\n", b"")
            assert status in (307, 400, 404, 405), name
        assert reached(upstream) == set()


def test_where_any_path_goes_on_control_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class All:
        def __contains__(self, _: object) -> bool:
            return True

    route = front_module.Route
    anything: Any = lambda _, *own, **options: route("/v1/fleet/{call:path}", *own, **options)  # noqa: E731
    monkeypatch.setattr(front_module, "Route", anything)
    monkeypatch.setattr(front_module, "FLEET", All())
    with served(tmp_path) as (door, upstream, _):
        for path in PATHS.values():
            raw(door, f"POST {path} HTTP/1.1\r\ncontent-length: 0\r\n", b"")
        assert "/v1/control/list-runs" in reached(upstream)


def test_no_request_hides_another_and_none_is_the_fronts_own_fault(tmp_path: Path) -> None:
    with served(tmp_path) as (door, upstream, _):
        for name, (headers, expected) in FRAMED.items():
            status, _ = raw(door, START + headers, b"0\r\n\r\n" + HIDDEN)
            assert status == expected or (expected is None and status in (200, 400)), name
        assert reached(upstream) <= {"/v1/fleet/get-run"}


@pytest.mark.parametrize("name", ["two lengths", "header beyond ASCII"])
def test_where_malformed_requests_go_on_the_front_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(front_module, "_malformed", lambda request: False)
    with served(tmp_path) as (door, _, _):
        assert raw(door, START + FRAMED[name][0], b"0\r\n\r\n" + HIDDEN)[0] == 500


def version(door: Door, newest: ssl.TLSVersion) -> str | None:
    """The version of TLS with which a client gets in that speaks none later; None: not at all."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    host, port = door.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as plain:
        try:
            with context.wrap_socket(plain) as secured:
                return secured.version()
        except (ssl.SSLError, ConnectionError):
            return None


def test_tls_is_that_of_today(tmp_path: Path) -> None:
    with served(tmp_path) as (door, _, _):
        found = [version(door, newest) for newest in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)]
        assert found == [None, None]
        assert version(door, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        assert version(door, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


def test_where_the_front_takes_any_tls_an_old_one_gets_in(tmp_path: Path) -> None:
    with served(tmp_path) as (door, _, front):
        context = front.server.config.ssl
        assert context
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("ALL:@SECLEVEL=0")
        assert version(door, ssl.TLSVersion.TLSv1) == "TLSv1"
