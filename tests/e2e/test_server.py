"""`corolla server` as it runs: real SuperLink, TLS and keys on loopback; it survives every kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.runtime import RuntimeHttpClient

from corolla.embedded.assets import asset
from corolla.host import certificates
from corolla.host.processes import free_port
from tests.e2e.federation import Server, make_key, running_client, running_server
from tests.e2e.forked import Commands

pytestmark = pytest.mark.deployment

BIN = Path(sys.executable).parent
QUICK = (
    "--local-steps 2 --batch-size 4 --set threads=1 --set eval-examples=8 --set eval-clients=0 "
    "--set max-length=64 --set deadline=120 --set wait=200 --set quorum=1"
)


def until(true: Callable[[], object], server: Server, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, server.said()
        time.sleep(0.1)


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def serverapp(server: Server) -> psutil.Process | None:
    for process in children(server):
        if any("flwr-serverapp" in word for word in process.cmdline()):
            return process
    return None


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for clients."""
    with running_server(tmp_path_factory.mktemp("idle"), f"{QUICK} --rounds 1") as server:
        yield server


def control(server: Server, address: str, ca: Path) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(address, False, ca.read_bytes(), [])


def test_only_the_front_can_be_reached_and_flower_is_on_loopback(idle: Server) -> None:
    listening = {}
    for process in [psutil.Process(idle.process.pid), *children(idle)]:
        for found in process.net_connections("inet"):
            if found.status == psutil.CONN_LISTEN:
                listening[found.laddr.port] = found.laddr.ip
    front = int(idle.address.rsplit(":")[-1])
    assert listening.keys() == {front, idle.superlink_port()}
    assert listening[idle.superlink_port()] == "127.0.0.1"


def test_control_and_runtime_fail_through_the_front(idle: Server, tmp_path: Path) -> None:
    """The same calls work on loopback: that they do is why they must not be reachable."""
    outside = control(idle, idle.address, idle.ca)
    inner = idle.out / "flower" / "tls" / "ca.pem"
    inside = control(idle, f"127.0.0.1:{idle.superlink_port()}", inner)
    pem = certificates.public_key(make_key(tmp_path, "intruder").with_suffix(".pub"))
    before = len(inside.ListNodes(ListNodesRequest()).nodes_info)
    for call in (
        lambda: outside.RegisterNode(RegisterNodeRequest(public_key=pem)),
        lambda: outside.ListNodes(ListNodesRequest()),
        lambda: outside.StartRun(StartRunRequest()),
    ):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            call()
        assert caught.value.response.status_code == 404
    assert len(inside.ListNodes(ListNodesRequest()).nodes_info) == before
    runtime = RuntimeHttpClient.from_server_address(idle.address, False, idle.ca.read_bytes(), [])
    for ask in (
        lambda: runtime.AcquireTask(AcquireTaskRequest()),
        lambda: runtime.GetNodes(GetNodesRequest()),
    ):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            ask()
        assert caught.value.response.status_code == 404
    # On loopback other users of the machine cannot take tasks: they lack the secret.
    local = RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{idle.superlink_port()}", False, inner.read_bytes(), []
    )
    with pytest.raises(httpx.HTTPStatusError) as caught:
        local.AcquireTask(AcquireTaskRequest())
    assert caught.value.response.status_code in (401, 403)
    for client in (outside, inside, runtime, local):
        client.close()


def test_a_key_that_is_not_registered_cannot_join_and_one_that_comes_later_can(
    idle: Server, tmp_path: Path
) -> None:
    key = make_key(tmp_path, "late")
    inner = idle.out / "flower" / "tls" / "ca.pem"
    inside = control(idle, f"127.0.0.1:{idle.superlink_port()}", inner)

    def online() -> int:
        return sum(n.status == "online" for n in inside.ListNodes(ListNodesRequest()).nodes_info)

    refused = subprocess.run(
        supernode(idle, key), env=environment(tmp_path), capture_output=True, timeout=90
    )
    assert b"Exit Code: 305" in refused.stdout + refused.stderr
    assert online() == 0
    log = idle.out / "logs" / "supervisor.jsonl"
    until(lambda: '"event": "refused"' in log.read_text(), idle)
    (idle.keys / "broken.pub").write_text("hello")
    (idle.keys / "late.pub").write_bytes(key.with_suffix(".pub").read_bytes())
    until(lambda: '"client": "late"' in log.read_text(), idle)
    assert idle.said().count("broken.pub is no public key") == 1
    with subprocess.Popen(
        supernode(idle, key),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as node:
        until(lambda: online() == 1, idle)
        node.terminate()
    inside.close()


def supernode(server: Server, key: Path) -> list[str]:
    return [
        *(str(BIN / "flower-supernode"), "--superlink", server.address),
        *("--root-certificates", str(server.ca), "--auth-supernode-private-key", str(key)),
        *("--host", "127.0.0.1", "--port", str(free_port()), "--isolation", "process"),
        *("--max-retries", "1"),
    ]


def environment(folder: Path) -> dict[str, str]:
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **off, "FLWR_HOME": str(folder / "home"), "PATH": path}


def test_sigterm_ends_everything_and_says_how_to_go_on(tmp_path: Path) -> None:
    with running_server(tmp_path, f"{QUICK} --rounds 1") as server:
        until(lambda: (server.out / "flower" / "serverapp.json").exists(), server)
        processes = children(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.finish(90) == 1
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    last = server.said().strip().splitlines()[-1]
    assert last.startswith("error: stopped")
    assert len(last.splitlines()) == 1


def rows(folder: Path, names: list[str]) -> Path:
    """A file of each client, and one of all: the first rows of the embedded data, dealt in turn."""
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    dealt: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, line in enumerate(lines):
        name = names[number % len(names)]
        dealt[name].append({**json.loads(line), "client_id": name})
    for name, own in dealt.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    everything = folder / "all.jsonl"
    everything.write_text("".join(json.dumps(r) + "\n" for own in dealt.values() for r in own))
    return everything


def test_whatever_is_killed_the_run_ends_in_the_adapter_of_an_undisturbed_one(
    commands: Commands,
    tmp_path: Path,
) -> None:
    """SIGKILL to the ServerApp, to the SuperLink, then to the supervisor: faults 20 and 21.

    Whoever resumes it asks for a round more: the run is extended.
    """
    names = ["a", "b"]
    everything = rows(tmp_path, names)
    options = f"--strategy flora --data {everything} --cohort 2 --set schedule=constant {QUICK}"
    simulated = tmp_path / "simulated"
    simulate = ["simulate", *options.split(), "--rounds", "5", "--out", str(simulated)]
    commands.run(*simulate, folder=tmp_path)
    expected = json.loads((simulated / "run.json").read_text())
    options += " --min-clients 2 --rounds 4"
    with (
        running_server(tmp_path, options) as server,
        running_client(tmp_path, server, "a", tmp_path / "a.jsonl"),
        running_client(tmp_path, server, "b", tmp_path / "b.jsonl"),
    ):
        until(lambda: "round 1:" in server.said(), server, 180)
        app = serverapp(server)
        assert app is not None
        app.kill()
        until(lambda: "the run goes on from round 1" in server.said(), server)
        until(lambda: "round 2:" in server.said(), server, 180)
        link = [p for p in children(server) if "flower-superlink" in " ".join(p.cmdline())]
        link[0].kill()
        until(lambda: "superlink ended with code -9" in server.said(), server)
        until(lambda: "round 3:" in server.said(), server, 240)
        server.process.kill()
        server.process.wait()
        with running_server(tmp_path, "--rounds 5", resume=True) as again:
            assert again.address == server.address
            assert again.finish(300) == 0, again.said()
    found = json.loads((server.out / "run.json").read_text())
    assert found["status"] == "done"
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["adapter_sha256"] == expected["adapter_sha256"]
    lines = (server.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4, 5]
