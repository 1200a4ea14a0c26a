"""A SuperLink is asked on real sockets whether it answers, and a message says if it does not."""

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from corolla.host.processes import bypass_proxies, free_port
from corolla.server.deployment.superlink import Control, Place


class Health(BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *told: object) -> None: ...


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place at which somebody answers in the SuperLink's stead."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for own in (name, name.upper()):
            monkeypatch.setenv(own, "")
            monkeypatch.delenv(own)
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        found = Place(tmp_path, int(server.server_address[1]))
        found.prepare()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls = found.home / "tls"
        context.load_cert_chain(tls / "server.pem", tls / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


@pytest.mark.parametrize("name", ["https_proxy", "all_proxy", "ALL_PROXY"])
def test_a_dead_proxy_is_named_and_bypassed(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    control = Control(place)
    assert not control.ready()
    assert control.answer.startswith(f"GET https://127.0.0.1:{place.port}/health: ")
    assert f"({name}=http://127.0.0.1:" in control.answer
    control.close()
    bypass_proxies()
    control = Control(place)
    assert control.ready()
    control.close()


def test_an_answer_that_is_none_of_a_superlink_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Health, "code", 503)
    control = Control(place)
    assert not control.ready()
    assert control.answer.endswith("/health: 503 Service Unavailable")
    control.close()
