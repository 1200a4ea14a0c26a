"""The front: TLS, the Fleet API and nothing else; before a server that records what reaches it."""

import base64
import contextlib
import http.server
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from corolla.errors import ConfigError
from corolla.host import certificates, logs
from corolla.host.processes import free_port
from corolla.server.deployment import connections
from corolla.server.deployment import front as front_module
from corolla.server.deployment.front import FLEET, MAX_BODY, Front, bound, listen

ROOT = Path(__file__).resolve().parents[3]


class Upstream(http.server.ThreadingHTTPServer):
    """Answers every POST with its own path and body, over TLS on loopback."""

    daemon_threads = True
    status = 200

    def __init__(self, tls: Path) -> None:
        super().__init__(("127.0.0.1", 0), Recorder)
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls / "server.pem", tls / "server.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)


class Recorder(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, len(body)))
        self.send_response(self.server.status)
        self.send_header("content-type", "application/protobuf")
        self.send_header("content-length", str(len(body)))
        self.send_header("set-cookie", "a=b")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    certificates.make(tmp_path / "inner", [])
    server = Upstream(tmp_path / "inner")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Door:
    """The built-in front or nginx, before `upstream`."""

    address: str


@pytest.fixture(params=["builtin", "nginx"])
def front(upstream: Upstream, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Door]:
    certificates.make(tmp_path / "outer", [])
    port = int(upstream.server_address[1])
    if request.param == "nginx":
        with nginx(tmp_path, port) as address:
            yield Door(address)
        return
    with built_in(tmp_path / "outer", port, tmp_path / "inner" / "ca.pem") as (address, _):
        yield Door(address)


@contextlib.contextmanager
def built_in(certs: Path, port: int, ca: Path) -> Iterator[tuple[str, Front]]:
    """(its address, a front in a thread of this process: what tests change of it, changes)."""
    with listen("127.0.0.1:0") as door:
        made = Front(door, certs, port, ca)
        thread = threading.Thread(target=made.run)
        thread.start()
        try:
            yield bound(door), made
        finally:
            made.stop()
            thread.join()


@contextlib.contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[str]:
    """A real nginx with deploy/nginx.conf, its paths and ports put in place; ended by its id."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed here")
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    port = free_port()
    for old, new in {
        "/etc/corolla/certs": str(folder / "outer"),
        "/var/lib/corolla/run/flower/tls": str(folder / "inner"),
        "127.0.0.1:9091": f"127.0.0.1:{upstream}",
        "listen 9092": f"listen 127.0.0.1:{port}",
        "worker_processes auto": "worker_processes 1",
    }.items():
        assert text.count(old) in (1, 2), old
        text = text.replace(old, new)
    config, log = folder / "nginx.conf", folder / "nginx.log"
    config.write_text(text)
    command = [program, "-c", str(config), "-e", str(log)]
    command += ["-g", f"pid {folder / 'nginx.pid'}; daemon off;"]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture
def client(front: Door, tmp_path: Path) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(tmp_path / "outer" / "ca.pem"))
    with httpx.Client(
        base_url=f"https://{front.address}", verify=context, timeout=60, trust_env=False
    ) as made:
        yield made


def test_fleet_calls_travel_whole_with_the_headers_they_need(
    client: httpx.Client, upstream: Upstream
) -> None:
    body = bytes(range(256)) * 20_000  # 5 MB, as one object of Flower
    headers = {
        "flwr-public-key": "k",
        "flwr-signature": "s",
        "flwr-timestamp": "t",
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
        "cookie": "secret=1",
        "x-forwarded-for": "1.2.3.4",
        "authorization": "Bearer x",
    }
    for call in sorted(FLEET):
        answer = client.post(f"/v1/fleet/{call}", content=body, headers=headers)
        assert (answer.status_code, answer.content) == (200, body)
        assert answer.headers["content-type"] == "application/protobuf"
        assert "set-cookie" not in answer.headers
    assert [path for _, path, _, _ in upstream.seen] == [f"/v1/fleet/{c}" for c in sorted(FLEET)]
    for _, _, got, size in upstream.seen:
        assert size == len(body)
        assert {n: got[n] for n in headers if n.startswith(("flwr-", "content", "accept"))} == {
            n: v for n, v in headers.items() if n.startswith(("flwr-", "content", "accept"))
        }
        assert not {"cookie", "x-forwarded-for", "authorization"} & got.keys()


OUTSIDE = [
    "/",
    "/health",
    "/docs",
    "/openapi.json",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
    "//v1/fleet/pull-messages",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/Pull-Messages",
    "/v1/fleet/pull-messages;/../start-run",
]


def test_nothing_else_reaches_the_superlink(front: Door, upstream: Upstream) -> None:
    """Written on the socket byte by byte: a client library would tidy the path."""
    for path in OUTSIDE:
        for method in ("POST", "GET"):
            status, _ = raw(front, f"{method} {path} HTTP/1.1\r\ncontent-length: 2\r\n", b"hi")
            assert status in (400, 404, 405, 307), (method, path)
    assert upstream.seen == []


def test_other_methods_of_fleet_paths_are_refused(front: Door, upstream: Upstream) -> None:
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "TRACE"):
        status, _ = raw(front, f"{method} /v1/fleet/pull-messages HTTP/1.1\r\n", b"")
        assert status in (400, 404, 405), method
    assert upstream.seen == []


def test_what_two_parsers_could_read_apart_is_refused(front: Door, upstream: Upstream) -> None:
    """Request smuggling: a second call hidden in the body of the first."""
    hidden = (
        b"0\r\n\r\nPOST /v1/control/list-nodes HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    )
    start = "POST /v1/fleet/pull-messages HTTP/1.1\r\n"
    both = f"{start}content-length: {len(hidden)}\r\ntransfer-encoding: chunked\r\n"
    raw(front, both, hidden)
    twice = f"{start}content-length: 5\r\ncontent-length: {len(hidden)}\r\n"
    assert raw(front, twice, hidden)[0] == 400
    last = "/v1/fleet/get-run"  # by then whatever was passed on has come
    assert raw(front, f"POST {last} HTTP/1.1\r\ncontent-length: 0\r\n", b"")[0] == 200
    assert {path for _, path, _, _ in upstream.seen} <= {"/v1/fleet/pull-messages", last}


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
@pytest.mark.parametrize(
    "headers",
    ["content-length: 5\r\ntransfer-encoding: chunked", "content-length: 0\r\nflwr-public-key: é"],
    ids=["two lengths", "beyond ASCII"],
)
def test_a_malformed_request_is_the_callers_fault(
    front: Door, upstream: Upstream, headers: str
) -> None:
    start = f"POST /v1/fleet/get-run HTTP/1.1\r\n{headers}\r\n"
    assert raw(front, start, b"0\r\n\r\n")[0] == 400
    assert upstream.seen == []


def test_bodies_have_a_limit_declared_or_not(
    client: httpx.Client, front: Door, upstream: Upstream
) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY // (1 << 20) + 2):
            yield b"x" * (1 << 20)

    url = "/v1/fleet/push-object"
    assert raw(front, f"POST {url} HTTP/1.1\r\ncontent-length: {MAX_BODY + 1}\r\n", b"")[0] == 413
    with contextlib.suppress(httpx.TransportError):  # the rest of it is not read
        assert client.post(url, content=endless()).status_code == 413
    assert all(size <= MAX_BODY for _, _, _, size in upstream.seen)
    assert client.post(url, content=b"x" * 1000).status_code == 200


def test_a_superlink_that_is_away_is_502(upstream: Upstream, tmp_path: Path) -> None:
    certificates.make(tmp_path / "outer", [])
    with socket.socket() as nobody:  # bound and not listening
        nobody.bind(("127.0.0.1", 0))
        port = int(nobody.getsockname()[1])
        context = ssl.create_default_context(cafile=str(tmp_path / "outer" / "ca.pem"))
        with built_in(tmp_path / "outer", port, tmp_path / "inner" / "ca.pem") as (address, _):
            url = f"https://{address}/v1/fleet/get-run"
            assert httpx.post(url, verify=context, trust_env=False).status_code == 502


def test_a_superlink_with_another_certificate_is_not_spoken_to(
    upstream: Upstream, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "other", [])
    port = int(upstream.server_address[1])
    context = ssl.create_default_context(cafile=str(tmp_path / "other" / "ca.pem"))
    with built_in(tmp_path / "other", port, tmp_path / "other" / "ca.pem") as (address, _):
        url = f"https://{address}/v1/fleet/get-run"
        assert httpx.post(url, verify=context, content=b"1", trust_env=False).status_code == 502
    assert upstream.seen == []


def test_without_tls_or_the_ca_there_is_no_answer(front: Door, upstream: Upstream) -> None:
    url = f"{front.address}/v1/fleet/get-run"
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(f"http://{url}", content=b"1", trust_env=False).status_code == 400
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"https://{url}", content=b"1", trust_env=False)
    assert upstream.seen == []


def test_an_address_that_is_taken_or_none_is_one_line() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    for address, found in (
        (f"127.0.0.1:{taken.getsockname()[1]}", "Address already in use"),
        ("nowhere.invalid:1", "cannot be had"),
        ("127.0.0.1:99999", "expected HOST:PORT"),
        ("127.0.0.1", "expected HOST:PORT"),
        ("127.0.0.1:http", "expected HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=found) as caught:
            listen(address)
        assert "\n" not in str(caught.value)
    taken.close()


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
@pytest.mark.parametrize(
    ("seconds", "said"), [(-600, "600 s behind"), (600, "600 s ahead"), (0, "not registered")]
)
def test_why_a_node_is_refused_is_logged_once(
    client: httpx.Client, upstream: Upstream, tmp_path: Path, seconds: int, said: str
) -> None:
    upstream.status = 401
    log = tmp_path / "front.jsonl"
    logs.configure(log)
    try:
        key = base64.b64encode(f"key {said}".encode()).decode()
        signed = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        headers = {"flwr-public-key": key, "flwr-timestamp": signed}
        for _ in range(3):
            client.post("/v1/fleet/activate-node", headers=headers, content=b"")
    finally:
        logs.unconfigure()
    lines = log.read_text().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/fleet/get-run HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\nPOST",  # one answer does not buy the connection
        b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1",
    ],
)
def test_who_sends_no_whole_request_keeps_no_connection(
    front: Door, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Also where its bytes come one part after the other."""
    came = threading.Semaphore(0)
    received = connections.Hurried.data_received

    def noted(connection: connections.Hurried, data: bytes) -> None:
        received(connection, data)
        came.release()

    monkeypatch.setattr(connections.Hurried, "data_received", noted)
    monkeypatch.setattr(connections, "HEAD", 0.5)
    monkeypatch.setattr(front_module, "_WHOLE", 0.5)
    with open_tls(front) as secured:
        for part in (sent[:-4], sent[-4:]):
            if part:
                with contextlib.suppress(ConnectionError, ssl.SSLError):  # closed already
                    secured.sendall(part)
                came.acquire(timeout=0.5)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while secured.recv(65536):
                pass


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
def test_a_node_that_is_idle_between_calls_keeps_its_connection(
    front: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    with open_tls(front) as secured:
        secured.sendall(call)
        assert secured.recv(65536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEAD", 0.2)
        closed_for_want_of_a_request(front)  # one that began later
        secured.sendall(call)
        assert secured.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
def test_callers_cannot_fill_the_log(
    client: httpx.Client, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.status = 401
    monkeypatch.setattr(front_module, "_LINES", 3)
    log = tmp_path / "front.jsonl"
    logs.configure(log)
    try:
        for number in range(9):
            if number == 8:
                monkeypatch.setattr(front_module, "_WINDOW", 0.0)
            client.post("/v1/fleet/get-run", headers={"flwr-public-key": f"k{number}"})
    finally:
        logs.unconfigure()
    lines = log.read_text().splitlines()
    assert len(lines) == 3 + 2
    assert "and 5 more" in lines[3]


@pytest.mark.parametrize("front", ["builtin"], indirect=True)
def test_who_does_not_begin_tls_keeps_no_connection(
    front: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE", 0.2)
    host, port = front.address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=60) as silent,
        contextlib.suppress(ConnectionError),
    ):
        assert silent.recv(1) == b""


def test_certificates_that_are_none_are_one_line(tmp_path: Path) -> None:
    for name in ("server.pem", "server.key"):
        (tmp_path / name).write_text("nothing")
    certificates.make(tmp_path / "ca", [])
    with (
        listen("127.0.0.1:0") as door,
        pytest.raises(ConfigError, match=r"cannot serve with .*server\.pem"),
    ):
        Front(door, tmp_path, 1, tmp_path / "ca" / "ca.pem")


def test_the_front_is_a_process_that_is_started_again_at_the_same_door(
    upstream: Upstream, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "outer", [])
    (tmp_path / "logs").mkdir()
    context = ssl.create_default_context(cafile=str(tmp_path / "outer" / "ca.pem"))
    port, ca = int(upstream.server_address[1]), tmp_path / "inner" / "ca.pem"
    with listen("127.0.0.1:0") as door:
        child = front_module.process(door, tmp_path / "outer", port, ca, tmp_path / "logs", "r1")
        child.start()
        try:
            url = f"https://{bound(door)}/v1/fleet/get-run"
            upstream.status = 401
            for _ in range(2):
                found = httpx.post(url, verify=context, timeout=60, trust_env=False)
                assert found.status_code == 401
                child.send(signal.SIGKILL)
                assert child.wait() == -signal.SIGKILL
                assert "front ended with code -9; starting it again" in str(child.tend())
                deadline = time.monotonic() + 60
                while child.pid is None:
                    child.tend()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        finally:
            child.close()
    lines = (tmp_path / "logs" / "supervisor.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all("not signed" in line and "r1" in line for line in lines)


def closed_for_want_of_a_request(front: Door) -> None:
    """Returns when a connection that sends nothing has been closed."""
    with (
        contextlib.suppress(ConnectionError, ssl.SSLError),
        open_tls(front) as silent,
    ):
        assert silent.recv(65536) == b""


@contextlib.contextmanager
def open_tls(front: Door) -> Iterator[ssl.SSLSocket]:
    host, port = front.address.split(":")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((host, int(port)), timeout=60) as plain,
        context.wrap_socket(plain) as secured,
    ):
        yield secured


def raw(front: Door, start: str, body: bytes) -> tuple[int, bytes]:
    """The status and all bytes that come back for a request written as it stands."""
    with open_tls(front) as secured:
        secured.sendall(start.encode() + b"host: x\r\nconnection: close\r\n\r\n" + body)
        data = b""
        with contextlib.suppress(OSError):
            while chunk := secured.recv(65536):
                data += chunk
    return int(data.split(b" ", 2)[1]), data
