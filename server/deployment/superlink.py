"""Flower's server processes on loopback, and the calls of its Control API that a server needs.

`flower-superlink` keeps its state in SQLite and `flower-superexec` starts ServerApps outside of
it, so that a run survives a restart of the SuperLink. Facts of Flower 1.41 that decide the shape:
Control has no authentication (hence loopback, and server/deployment/front.py before it), and
neither does Runtime without the secret of the SuperExec.
"""

import hashlib
import os
import secrets
import ssl
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from corolla.errors import ConfigError, RoundError
from corolla.host import certificates
from corolla.host.files import making_folder, write_atomic
from corolla.host.processes import named_proxies
from corolla.host.supervised import Child
from corolla.server.deployment.order import FOLDER
from corolla.version import __version__

FLWR = "1.41"
"""Control and Fleet change between releases; SuperLink and SuperNodes must share this one."""
_BIN = Path(sys.executable).parent
_BUNDLE = {
    "server_app.py": "from corolla.server.app import app\n",
    "client_app.py": "from corolla.client.device.relay import app\n",
    "pyproject.toml": f"""\
[project]
name = "corolla-run"
version = "{__version__}"
description = "Imports the Corolla that is installed where it runs"
license = "Apache-2.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "corolla"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
""",
}


def check_version() -> None:
    """Raises ConfigError when the Flower that is installed is not the one this is written for."""
    found = version("flwr")
    if not f"{found}.".startswith(f"{FLWR}."):
        raise ConfigError(
            f"flwr {found} is installed, the server needs {FLWR}: pip install 'flwr=={FLWR}.*'"
        )


@dataclass(frozen=True)
class Place:
    """Where the processes of one server live: all below `folder`/flower and `folder`/logs."""

    folder: Path
    port: int
    """Of the SuperLink, on loopback."""

    @property
    def home(self) -> Path:
        return self.folder / "flower"

    @property
    def ca(self) -> Path:
        return self.home / "tls" / "ca.pem"

    def prepare(self) -> None:
        """Folders, certificates for loopback, the secret of the SuperExec; kept from run to run."""
        for path in (self.home / "home", self.folder / "logs"):
            path.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)  # state.db holds updates on their way
        tls, secret = self.home / "tls", self.home / "secret"
        if not (tls / "server.pem").exists():
            with making_folder(tls) as scratch:
                scratch.chmod(0o700)
                certificates.make(scratch, (), days=3650)
        if not secret.exists() or not secret.stat().st_size:
            write_atomic(secret, secrets.token_hex(32).encode(), private=True)

    def processes(self) -> list[Child]:
        """SuperLink and SuperExec; the latter ends with this process, and its ServerApp with it."""
        env = {
            **os.environ,
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # it starts one ServerApp a run
            "FLWR_LOG_LEVEL": "WARNING",  # else a line for each call of each node, for days
            FOLDER: str(self.folder),
        }
        tls, secret = self.home / "tls", str(self.home / "secret")
        superlink = [
            *(str(_BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-certfile", str(tls / "server.pem"), "--ssl-keyfile", str(tls / "server.key")),
            *("--ssl-ca-certfile", str(self.ca), "--enable-supernode-auth"),
            *("--database", str(self.home / "state.db"), "--isolation", "process"),
            *("--superexec-auth-secret-file", secret, "--disable-runtime-dependency-installation"),
        ]
        superexec = [
            *(str(_BIN / "flower-superexec"), "--executor", "subprocess"),
            *("--runtime-api-address", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.ca), "--superexec-auth-secret-file", secret),
            *("--parent-pid", str(os.getpid())),
        ]
        logs = self.folder / "logs"
        return [
            Child(superlink, logs / "superlink.log", env=env, cwd=logs),
            Child(superexec, logs / "superexec.log", env=env, cwd=logs),
        ]


def _refusal(what: str, error: httpx.HTTPStatusError) -> Exception:
    """A fault of the SuperLink, for the caller to try again, or its answer, which is final."""
    if error.response.is_server_error:
        return error
    return RoundError(f"Flower refuses {what}: {error.response.text[:200]}")


class Control:
    """The requests of a server to its SuperLink.

    Every one but `ready` raises httpx.HTTPError while the SuperLink is away.
    """

    def __init__(self, place: Place) -> None:
        self._url = f"https://127.0.0.1:{place.port}"
        self._tls = ssl.create_default_context(cafile=str(place.ca))
        self._client = ControlHttpClient(self._url, verify=self._tls, timeout=10.0)
        self.answer = ""
        """The last request of `ready`, and what came back."""

    def close(self) -> None:
        self._client.close()

    def ready(self) -> bool:
        """Returns whether the SuperLink answers."""
        asked = f"{self._url}/health"
        try:
            found = httpx.get(asked, verify=self._tls, timeout=2)
        except httpx.HTTPError as error:
            self.answer = f"GET {asked}: {error}{named_proxies()}"
            return False
        self.answer = f"GET {asked}: {found.status_code} {found.reason_phrase}{named_proxies()}"
        return found.is_success

    def register(self, pem: bytes) -> bool:
        """Let a node with this key join; False when it may already. Raises RoundError."""
        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=pem))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 412:  # this key is in use already
                return False
            raise _refusal("a key", error) from error
        return True

    def submit(self) -> int:
        """Start the run of this folder; its id. Raises RoundError when Flower refuses it."""
        files = {name: text.encode() for name, text in _BUNDLE.items()}
        content = build_fab_from_files(files)[0]
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        try:
            answer = self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        except httpx.HTTPStatusError as error:
            raise _refusal("the run", error) from error
        if not answer.HasField("run_id"):
            raise RoundError("Flower refuses the run and gives no reason")
        return int(answer.run_id)

    def status(self, run: int) -> tuple[str, str]:
        """(pending, starting, running, or finished:completed|failed|stopped; what Flower adds)."""
        try:
            status = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return "finished:failed", "the SuperLink has lost its database"
            raise
        told = f"{status.status}:{status.sub_status}" if status.sub_status else status.status
        return told, status.details

    def stop_others(self) -> None:
        """End what an earlier server has left running: its messages are of no use any more."""
        for run, found in self._client.ListRuns(ListRunsRequest()).run_dict.items():
            if found.status.status != "finished":
                self._client.StopRun(StopRunRequest(run_id=run))
