"""`corolla client` against a real server: what it says when it cannot join, what it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla.client.device.identity import identity
from corolla.host import certificates
from corolla.server.deployment import members
from tests.e2e.federation import (
    OPTIONS,
    Server,
    make_key,
    register,
    running,
    running_client,
    running_server,
)

pytestmark = pytest.mark.deployment

ADA, BEN = "asyncio", "calendar"
"""Clients of the embedded data: the first has enough rows to be at work for a while."""


def wait_for(what: Callable[[], object], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for more clients than ever come."""
    options = f"{OPTIONS} --min-clients 9 --set wait=1200"
    with running_server(tmp_path_factory.mktemp("idle"), options) as server:
        yield server


NODE = """
import sys
from pathlib import Path
from corolla.client.device.node import Node
from corolla.client.device.identity import identity
from corolla.client.device.supernode import Link
server, ca, state = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
ready = [sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(600)"]
Node(Link(server, ca, "ada", state, identity(state)[0]), ready, {}, print).run()
"""


@contextmanager
def client(folder: Path, server: Server, ca: Path, patch: str = "") -> Iterator[Path]:
    """`corolla client` without a model, its key not registered; yields the file of its words.

    `patch` is run in each of its processes before anything else.
    """
    site, log = folder / "site", folder / "client.log"
    site.mkdir()
    (site / "sitecustomize.py").write_text(patch)
    command = [sys.executable, "-u", "-c", NODE, server.address, str(ca), str(folder / "state")]
    env = {**os.environ, "PYTHONPATH": str(site)}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, env=env) as process:
        try:
            yield log
        finally:
            process.terminate()
            process.wait(60)


def test_a_key_that_is_not_registered_is_said_and_joins_once_it_is(
    idle: Server, tmp_path: Path
) -> None:
    with client(tmp_path, idle, idle.ca) as log:
        wait_for(lambda: "ask the owner of" in log.read_text(), 90, log)
        assert f"register {tmp_path / 'state' / 'client.pub'}; trying again" in log.read_text()
        assert "connected" not in log.read_text()
        key, _ = identity(tmp_path / "state")
        (idle.keys / "late.pub").write_bytes(key.public.read_bytes())
        wait_for(lambda: f"connected to {idle.address} as ada" in log.read_text(), 90, log)
    assert log.read_text().endswith("stopped\n")


def test_who_takes_the_name_of_a_member_is_told_and_waits(idle: Server, tmp_path: Path) -> None:
    """And who is removed is told, too, while the server waits for others."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i} of eve"}) + "\n" for i in range(8)))
    make_key(tmp_path, "ben", idle.keys)  # he is away
    state, log = tmp_path / "state", tmp_path / "eve.log"
    command = ["client", "--server", idle.address, "--root-certificates", str(idle.ca)]
    command += ["--data", str(data), "--name", "ben", "--state", str(state), "--threads", "1"]
    refused = "the server refuses this client: "
    with running(command, log) as process:
        register(state, idle.keys / "eve.pub", process, log)
        wait_for(lambda: refused in log.read_text(), 240, log)
        told = "the name 'ben' is registered for another key: give this client --name eve"
        assert refused + told in log.read_text().replace("\n", " ")
        assert process.poll() is None
    found = {own.name: own for own in members.read(idle.keys)}
    assert {"ben", "eve"} <= found.keys()
    with running([*command[:-6], "--name", "eve", *command[-4:]], log) as process:
        wait_for(lambda: "connected to" in log.read_text().rpartition("stopped")[2], 240, log)
        members.remove(idle.keys, "eve")
        wait_for(
            lambda: "its key was removed by the owner of the server" in log.read_text(), 240, log
        )


def test_a_wrong_certificate_is_said(idle: Server, tmp_path: Path) -> None:
    certificates.make(tmp_path / "foreign", [])
    with client(tmp_path, idle, tmp_path / "foreign" / "ca.pem") as log:
        wait_for(lambda: "does not fit --root-certificates" in log.read_text(), 90, log)


CLOCK = """
import time
from datetime import timedelta
real = time.time
time.time = lambda: real() + 600
try:
    import flwr.supercore.date as date
    now = date.now
    date.now = lambda: now() + timedelta(seconds=600)
    import corolla.client.device.supernode as supernode
    class Ahead(supernode.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + timedelta(seconds=600)
    supernode.datetime = Ahead
except ImportError:
    pass
"""


def test_a_clock_ten_minutes_ahead_is_said(idle: Server, tmp_path: Path) -> None:
    """Flower's server answers 401 and no reason; Flower's client ends with exit code 0."""
    key, _ = identity(tmp_path / "state")
    (idle.keys / "ahead.pub").write_bytes(key.public.read_bytes())
    with client(tmp_path, idle, idle.ca, CLOCK) as log:
        wait_for(lambda: "s ahead of the server's: set it" in log.read_text(), 90, log)
        assert "connected" not in log.read_text()


def journal(out: Path, event: str) -> list[dict[str, Any]]:
    try:
        lines = (out / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in found if line["event"] == event]


def pid_of(state: Path, child: str) -> int:
    return int(json.loads((state / f"{child}.pid").read_text())["pid"])


def relays(state: Path) -> list[psutil.Process]:
    """The ClientApp of a message, if one is at work."""
    try:
        below = psutil.Process(pid_of(state, "supernode")).children(recursive=True)
        return [p for p in below if "corolla.client.device.relay" in p.cmdline()]
    except (psutil.Error, OSError, ValueError):
        return []


def test_whatever_dies_on_a_device_the_run_goes_on_and_it_comes_back(tmp_path: Path) -> None:
    """SIGKILL to the trainer, the ClientApp, then the SuperNode of one of two clients.

    Faults 2, 3 and 4, with a strategy whose clients keep control variates on their disk:
    without it a client's later updates would be refused.
    """
    options = (
        "--strategy scaffold --rounds 14 --local-steps 12 --batch-size 4 --set threads=1 "
        "--set eval-examples=4 --set eval-clients=0 --set deadline=40 --set wait=200 "
        "--set quorum=0.5 --set optimizer=sgd --lr 0.1 --min-clients 2"
    )
    state = tmp_path / f"state-{ADA}"
    with (
        running_server(tmp_path, options) as server,
        running_client(tmp_path, server, ADA, "embedded"),
        running_client(tmp_path, server, BEN, "embedded"),
    ):
        log, out = tmp_path / f"{ADA}.log", server.out

        def accepted() -> list[int]:
            """Rounds to which the client that is hurt has contributed."""
            found = journal(out, "verdicts")
            return [line["round"] for line in found if line["verdicts"].get(ADA) == "accepted"]

        wait_for(lambda: accepted(), 300, server.log)
        old = pid_of(state, "trainer")
        psutil.Process(old).kill()  # between two rounds, or in one
        before = accepted()[-1]
        wait_for(lambda: accepted()[-1] > before, 300, server.log)
        assert pid_of(state, "trainer") != old
        assert "the trainer ended: ended by signal 9" in log.read_text()

        wait_for(lambda: relays(state), 120, log)
        for process in relays(state):
            process.kill()
        before = accepted()[-1]
        wait_for(lambda: len(accepted()) and accepted()[-1] > before, 300, server.log)

        psutil.Process(pid_of(state, "supernode")).send_signal(signal.SIGKILL)
        before = accepted()[-1]
        wait_for(lambda: accepted()[-1] > before, 300, server.log)
        assert "the SuperNode ended by signal 9" in log.read_text()
        assert "still counts the last connection as alive" in log.read_text()

        committed = [line["round"] for line in journal(out, "committed")]
        assert committed == list(range(1, len(committed) + 1))
        why = [text for line in journal(out, "verdicts") for text in line.get("why", {}).values()]
        assert not any("lost" in text or "kept round" in text for text in why), why
        assert len(json.loads((out / "flower" / "names.json").read_text())) == 2
    assert log.read_text().endswith("stopped\n")
