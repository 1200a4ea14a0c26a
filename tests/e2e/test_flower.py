"""The same round code on Flower: its simulation engine and `flwr run`.

Ray and its workers import everything anew, which takes most of a minute: one run of it is a test of
`make test`, the others are of `make e2e`, here, in test_policies.py and in test_zeroth_order.py.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import checkout
from tests.e2e.forked import Commands

BIN = Path(sys.executable).parent
OPTIONS = "--clients 3 --cohort 2 --rounds 2 --local-steps 2 --batch-size 4"
QUICK = "--set threads=1 --set eval-examples=8 --set eval-client-examples=2"
ENGINES = {
    "compressed": ["--set", 'codec=["top_k:0.1","int8","zstd"]', "--set", 'codec-down=["bf16"]'],
    "flora": ["--strategy", "flora"],
}


def simulate(commands: Commands, folder: Path, *options: str) -> dict[str, object]:
    command = ["simulate", *OPTIONS.split(), *QUICK.split(), *options, "--keep-updates"]
    commands.run(*command, "--out", str(folder), folder=folder.parent)
    loaded: dict[str, object] = json.loads((folder / "run.json").read_text())
    return loaded


@pytest.mark.parametrize("how", ["compressed", pytest.param("flora", marks=pytest.mark.deployment)])
def test_both_engines_give_the_same_adapter(how: str, commands: Commands, tmp_path: Path) -> None:
    ours = simulate(commands, tmp_path / "a", *ENGINES[how])
    flower = simulate(commands, tmp_path / "b", *ENGINES[how], "--engine", "flower")
    assert flower["adapter_sha256"] == ours["adapter_sha256"]
    assert flower["state_sha256"] == ours["state_sha256"]
    assert (flower["bytes_up"], flower["bytes_down"]) == (ours["bytes_up"], ours["bytes_down"])
    updates = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in _updates(tmp_path)]
    assert updates[0] == updates[1] != []


def _updates(folder: Path) -> Iterator[Path]:
    yield folder / "a" / "updates"
    yield folder / "b" / "updates"


@pytest.mark.deployment
def test_a_client_that_diverges_on_flower_is_one_line(commands: Commands, tmp_path: Path) -> None:
    command = ["simulate", *OPTIONS.split(), *QUICK.split(), "--engine", "flower", "--lr", "1e6"]
    command += ["--out", str(tmp_path / "run")]
    log, errors = tmp_path / "log", tmp_path / "errors"
    assert commands.start(*command, folder=tmp_path, output=log, errors=errors).wait() == 1
    lines = [line for line in errors.read_text().splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "lower lr" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode on a free port, started in an empty folder, ended by PID."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "sim"\n[superlink.sim]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    env = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    neutral = tmp_path / "empty"
    neutral.mkdir()
    log = (tmp_path / "superlink.log").open("w")
    process = subprocess.Popen(
        [
            *(str(BIN / "flower-superlink"), "--insecure", "--simulation"),
            *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)),
            "--disable-runtime-dependency-installation",
        ],
        env=env,
        cwd=neutral,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "superlink.log").read_text()
                time.sleep(0.2)
        yield env
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


@pytest.mark.deployment
def test_flwr_run_from_the_checkout(superlink: dict[str, str], tmp_path: Path) -> None:
    def flwr(*words: str) -> dict[str, object]:
        done = subprocess.run(
            [str(BIN / "flwr"), *words, "--format", "json"],
            env=superlink,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        loaded: dict[str, object] = json.loads(done.stdout)
        return loaded

    out = tmp_path / "out"
    settings = (
        f'rounds=1 cohort=2 local-steps=1 batch-size=2 out="{out}" '
        'set="eval-examples=4 eval-clients=2 eval-client-examples=2"'
    )
    federation = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    started = flwr(
        *("run", str(checkout.sources(tmp_path)), "sim"),
        *("--run-config", settings, "--federation-config", federation),
    )
    assert started["success"], started
    deadline = time.monotonic() + 240
    status = ""
    while not status.startswith("finished"):
        assert time.monotonic() < deadline, status
        time.sleep(1)
        listed = flwr("ls", "sim", "--run-id", str(started["run-id"]))
        status = str(listed["runs"][0]["status"])  # type: ignore[index]
    log = subprocess.run(
        [str(BIN / "flwr"), "log", str(started["run-id"]), "sim", "--show"],
        env=superlink,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    ).stdout
    assert status == "finished:completed", log
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
