import errno
import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import psutil
import pytest

from corolla.client.device import supernode
from corolla.client.device.identity import identity
from corolla.client.device.node import Node, begin, make_child, only_one
from corolla.client.device.settings import Own
from corolla.client.device.supernode import Link, diagnose, explain
from corolla.errors import ConfigError, CorollaError
from corolla.host import certificates


def wait_for(what: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def link(tmp_path: Path) -> Link:
    key, _ = identity(tmp_path / "state")
    return Link("127.0.0.1:1", None, "ada", tmp_path / "state", key)


PARENT = """
import os, sys, time
from pathlib import Path
from corolla.client.device.node import make_child
made = make_child("thing", Path(sys.argv[1]), lambda line: print(line, flush=True), os.environ)
made.command = [sys.executable, "-c", sys.argv[2]]
made.start()
time.sleep(60)
"""
ORPHAN = """
import os, time
from corolla.host.processes import when_orphaned
when_orphaned(lambda: os._exit(3))
print(os.getpid(), flush=True)
time.sleep(60)
"""
STUBBORN = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize("code", [ORPHAN, STUBBORN])
def test_no_child_outlives_a_supervisor_that_is_killed(tmp_path: Path, code: str) -> None:
    """It leaves by itself; one that does not is ended when the next supervisor starts."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    if code == STUBBORN:
        assert psutil.pid_exists(pid)
        make_child("thing", tmp_path, print, os.environ)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_an_id_that_is_used_again_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        (tmp_path / "thing.pid").write_text(json.dumps({"pid": other.pid, "began": 1.0}))
        make_child("thing", tmp_path, print, os.environ)
        assert other.poll() is None
        other.kill()


def test_two_clients_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        only_one(tmp_path),
        pytest.raises(ConfigError, match="another corolla client"),
        only_one(tmp_path),
    ):
        pass
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import sys; print('noise'); print('error: no data'); sys.exit(1)", 1, "no data"),
        ("import sys; print('error: bad option'); sys.exit(2)", 2, "bad option"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "signal 9: out of memory"),
        ("", 1, "exit code 0"),
    ],
)
def test_a_trainer_that_cannot_start_ends_it_before_it_connects(
    link: Link, code: str, kind: int, message: str
) -> None:
    said: list[str] = []
    started = Node(link, [sys.executable, "-c", code], {}, said.append)
    with pytest.raises(CorollaError, match=message) as caught:
        started.run()
    assert caught.value.exit_code == kind
    assert not (link.state / "supernode.log").exists()


def test_what_a_trainer_notes_is_told_once(link: Link) -> None:
    said: list[str] = []
    heard = Node(link, [], {}, said.append)
    for line in ("noise", "note: too little memory", "note: too little memory", "note: other"):
        heard._of_trainer(line)
    assert said == ["too little memory", "other"]


def test_a_bundle_of_a_server_has_no_program_of_ours(link: Link) -> None:
    """Of Flower's programs a SuperNode finds those that we wrote, and they run our own code."""
    env = supernode.environment(link.state)
    assert env["PATH"].split(os.pathsep) == [str(link.state / "bin"), "/usr/bin", "/bin"]
    for name, told in (("flwr-clientapp", "Run a Flower ClientApp"), ("flower-superexec", "")):
        done = subprocess.run(
            [name, "--help"], env=dict(env), capture_output=True, text=True, check=True
        )
        assert told in done.stdout
    assert "-m corolla.client.device.relay" in (link.state / "bin" / "flwr-clientapp").read_text()


REFUSED = """\
ERROR :     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: {code}] {text}
The SuperNode could not establish a connection to the SuperLink.

For more information, visit: <https://flower.ai/docs>"""
VERSION = """\
ERROR :     Exit Code: 606
SuperLink version 1.42.0 detected a runtime version mismatch: expected a peer from the same \
major.minor release, but received SuperNode version 1.41.0.
Upgrade your Flower version to the required version, or contact the server administrator."""


@pytest.mark.parametrize(
    ("code", "text", "inside", "before", "wanted"),
    [
        (1, REFUSED.format(code=2004, text="Failed"), False, False, "ask the owner of"),
        (1, REFUSED.format(code=2001, text="Disabled"), False, False, "ask the owner of"),
        (1, REFUSED.format(code=2004, text="Failed"), False, True, "for up to a minute"),
        (1, VERSION, False, False, "received SuperNode version 1.41.0"),
        (1, "[Errno 98] error while attempting: address already in use", False, True, "port"),
        (-9, "", True, True, "the SuperNode ended by signal 9"),
        (-11, "", True, True, "the SuperNode ended by signal 11"),
        (0, "SuperNode terminated gracefully.", True, True, "does not answer: Connection refused"),
    ],
)
def test_an_end_is_explained_in_one_line(
    link: Link, code: int, text: str, inside: bool, before: bool, wanted: str
) -> None:
    why = explain(link, code, text.splitlines(), inside, before)
    assert wanted in why
    assert "\n" not in why
    if "owner" in wanted:
        assert str(link.key.public) in why


@contextmanager
def https(folder: Path, behind: float = 0.0) -> Iterator[str]:
    """A server with TLS whose clock is `behind` seconds behind ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) - timedelta(seconds=behind), usegmt=True)

        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tls")
    for name in ("ours", "theirs"):
        certificates.make(folder / name, [])
    return folder


def test_a_server_that_is_well_leaves_nothing_to_say(tls: Path, link: Link) -> None:
    ca = tls / "ours" / "ca.pem"
    with https(tls / "ours") as server:
        assert diagnose(server, ca) == ""
        here = Link(server, ca, link.name, link.state, link.key)
        assert "has forgotten this connection" in explain(here, 0, [], True, True)
        assert "refuses the signature" in explain(here, 0, [], False, True)
        lines = REFUSED.format(code=1, text="Not Found").splitlines()
        assert "[code: 1] Not Found" in explain(here, 1, lines, False, False)


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        (600, "the clock of this device is 600 s ahead of the server's: set it"),
        (-600, "the clock of this device is 600 s behind the server's: set it"),
        (3, ""),
        (-200, ""),
    ],
)
def test_a_clock_that_is_off_is_said(tls: Path, behind: float, wanted: str) -> None:
    with https(tls / "ours", behind) as server:
        told = diagnose(server, tls / "ours" / "ca.pem")
    assert re.sub(r"59\d|60\d", "600", told) == wanted  # the server tells whole seconds


def test_a_wrong_certificate_is_said(tls: Path, tmp_path: Path) -> None:
    with https(tls / "ours") as server:
        told = diagnose(server, tls / "theirs" / "ca.pem")
        assert f"the certificate of {server} does not fit" in told
        assert "theirs" in told
        assert "the system" in diagnose(server, None)
        empty = tmp_path / "empty.pem"
        empty.write_text("")
        assert "cannot be used" in diagnose(server, empty)
        assert "cannot be used" in diagnose(server, tmp_path / "none.pem")


def test_a_client_does_not_begin_with_certificates_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    places = {"data": str(tmp_path / "rows.jsonl"), "state": tmp_path / "state"}
    own = Own.model_validate(
        {"server": "localhost:1", "root_certificates": tmp_path / "none.pem", **places}
    )
    with pytest.raises(ConfigError, match=r"none\.pem cannot be used: No such file"):
        begin(own, lambda text: None)


def test_a_server_without_tls_or_none_at_all_is_said() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        told = diagnose(f"127.0.0.1:{server.server_port}", None)
        thread.join()
        port = server.server_port
    assert "TLS" in told
    assert "does not answer: Connection refused" in diagnose(f"127.0.0.1:{port}", None)
    assert "does not answer" in diagnose("no.such.host.invalid:1", None)


def test_a_signal_while_the_trainer_loads_ends_it(link: Link, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from corolla.client.device.node import Node\n"
        "from corolla.client.device.identity import identity\n"
        "from corolla.client.device.supernode import Link\n"
        "state = Path(sys.argv[1]); key, _ = identity(state)\n"
        "trainer = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)']\n"
        "Node(Link('127.0.0.1:1', None, 'a', state, key), trainer, {}, print).run()\n"
    )
    command = [sys.executable, "-c", code, str(link.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (link.state / "trainer.log").exists())
        pid = json.loads((link.state / "trainer.pid").read_text())["pid"]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "stopped\n"
    assert not psutil.pid_exists(pid)


def test_a_full_disk_stops_no_supernode(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    supernode.environment(link.state)
    monkeypatch.setattr(Path, "write_text", full)
    assert "PATH" in supernode.environment(link.state)


def test_a_host_that_is_no_name_is_said() -> None:
    assert diagnose("a..b:1", None) == "a..b:1 has no host name that can be looked up"
