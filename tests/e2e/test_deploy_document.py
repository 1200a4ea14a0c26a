"""The commands of docs/deploy.md, in order, as a reader types them: on loopback, on free ports.

A block that begins with `# starts: NAME` goes on beside the next ones; before one that begins with
`# ends: NAME`, that process has ended by itself, with exit code 0.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corolla.embedded.assets import asset
from corolla.host.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400.0


def blocks() -> list[str]:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def on_loopback(command: str, ports: dict[str, int]) -> str:
    """The names and ports of the document as they are on this machine; a smaller run."""
    for name in ("coordinator.example", "gateway.example", "0.0.0.0"):
        command = command.replace(name, "localhost" if name != "0.0.0.0" else "127.0.0.1")
    for port, free in ports.items():
        command = command.replace(f":{port}", f":{free}")
    small = " --set threads=1 --set eval-examples=8 --set eval-clients=0 --set deadline=120"
    return command.replace("corolla server", "corolla server" + small)


@contextmanager
def ended(processes: dict[str, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes.values():
            process.wait(90)


@pytest.mark.deployment
def test_the_commands_of_the_document(tmp_path: Path) -> None:
    rows = asset("data.jsonl").read_text(encoding="utf-8").splitlines()
    for number, device in enumerate(("ada", "ben")):
        text = "".join(row + "\n" for row in rows[number : 48 + number : 2])
        (tmp_path / f"{device}.jsonl").write_text(text, encoding="utf-8")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    ports = {"9092": free_port(), "9443": free_port()}
    started: dict[str, subprocess.Popen[bytes]] = {}
    with ended(started):
        for block in blocks():
            command = on_loopback(block, ports)
            if name := re.match(r"# starts: (\S+)", block):
                with (tmp_path / f"{name[1]}.log").open("wb") as log:
                    started[name[1]] = subprocess.Popen(
                        ["bash", "-ec", command],
                        cwd=tmp_path,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                time.sleep(1)
                continue
            if name := re.match(r"# ends: (\S+)", block):
                code = started[name[1]].wait(LIMIT)
                assert code == 0, (tmp_path / f"{name[1]}.log").read_text()
            done = subprocess.run(
                ["bash", "-ec", command],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    for folder, members in (("federation", 2), ("phones", 3)):
        info = json.loads((tmp_path / folder / "run.json").read_text())
        assert info["status"] == "done"
        assert info["num_clients"] == members


def test_the_document_has_the_commands_that_exist() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    named = set(re.findall(r"corolla (certs|server|client|gateway|phone|status|plan)\b", text))
    assert named == {"certs", "server", "client", "gateway", "phone", "status", "plan"}
    assert len(blocks()) > 8
