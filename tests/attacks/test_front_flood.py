"""An outsider that opens connections to the front and says nothing, not even in TLS.

A front has as many files as its system gives it, here 128. Uncounted, silent connections have all
of them; and before the front was a process of its own, those of the server too.
"""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from corolla.host import certificates
from corolla.server.deployment.front import bound, listen
from tests.server.deployment.test_front import Upstream
from tests.server.gateway.gateways import until

FILES, FLOOD = 128, 400
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
from corolla.host.occupancy import Occupancy
from corolla.server.deployment import connections, front
"""
OPEN_DOOR = "Occupancy.enter = lambda *_: True; connections.HANDSHAKE = 1000.0\n"


class Victim:
    """A front in a process of its own, with few files."""

    def __init__(self, process: psutil.Process, address: str, ca: Path) -> None:
        self.process, self.address = process, address
        self._tls = ssl.create_default_context(cafile=str(ca))

    def status(self, seconds: float) -> int | None:
        """The status of an honest call; None where there is no answer."""
        url = f"https://{self.address}/v1/fleet/get-run"
        with contextlib.suppress(httpx.TransportError):
            found = httpx.post(url, verify=self._tls, timeout=seconds, trust_env=False)
            return found.status_code
        return None


@contextmanager
def serving(folder: Path, changes: str) -> Iterator[Victim]:
    for name in ("inner", "outer"):
        certificates.make(folder / name, [])
    upstream = Upstream(folder / "inner")
    thread = threading.Thread(target=upstream.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    code = LIMITED + changes + "sys.exit(front.main(sys.argv[1:]))"
    inner = folder / "inner" / "ca.pem"
    with listen("127.0.0.1:0") as door:
        words = [door.fileno(), folder / "outer", upstream.server_address[1], inner, folder, "r"]
        command = [sys.executable, "-c", code, *map(str, words)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[door.fileno()]) as process:
            try:
                ca = folder / "outer" / "ca.pem"
                victim = Victim(psutil.Process(process.pid), bound(door), ca)
                assert victim.status(60) == 200
                yield victim
            finally:
                process.kill()
    upstream.shutdown()
    thread.join()
    upstream.server_close()


@contextmanager
def flood(victim: Victim, source: str) -> Iterator[None]:
    """Connections from an address of this machine that stay open and silent."""
    host, port = victim.address.split(":")
    with ExitStack() as stack:
        for _ in range(FLOOD):
            own = socket.create_connection((host, int(port)), 60, source_address=(source, 0))
            stack.enter_context(own)
        yield


@pytest.mark.parametrize("source", ["127.0.0.2", "127.0.0.1"], ids=["another's", "the same"])
def test_silent_connections_keep_nobody_out(tmp_path: Path, source: str) -> None:
    """Also not those of their own address, as behind one router."""
    with serving(tmp_path, "") as victim, flood(victim, source):
        assert victim.status(60) == 200
        assert victim.process.num_fds() < FILES


def test_where_connections_are_not_counted_silent_ones_keep_all_others_out(tmp_path: Path) -> None:
    with serving(tmp_path, OPEN_DOOR) as victim:
        with flood(victim, "127.0.0.2"):
            until(lambda: victim.process.num_fds() >= FILES, 60)
            assert victim.status(3) is None
        until(lambda: victim.status(60) == 200, 120)
