"""A real `corolla server` for tests: TLS, keys of nodes, loopback, a free port, ended by its id."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corolla.host import certificates
from tests.e2e.forked import Commands

OPTIONS = (
    "--rounds 2 --local-steps 2 --batch-size 4 --set threads=1 --set eval-examples=8 "
    "--set eval-clients=0 --set deadline=120 --set wait=120"
)


@dataclass
class Server:
    """`address` is that of the front; `keys` the folder of public keys; `out` the run's folder."""

    address: str
    ca: Path
    keys: Path
    out: Path
    process: subprocess.Popen[bytes]
    log: Path
    commands: Commands | None = None
    """Starts its members; None: cold."""

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def finish(self, seconds: float = 120.0) -> int:
        """Its exit code once it ends by itself."""
        return self.process.wait(seconds)

    def superlink_port(self) -> int:
        """Where Control and Runtime are, on loopback."""
        return int(json.loads((self.out / "flower" / "place.json").read_text())["superlink"])


def make_key(folder: Path, name: str, keys: Path | None = None) -> Path:
    """The private key of a node, in PEM; its public half goes to `keys`/name.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    path = folder / f"{name}.key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)
    if keys:
        (keys / f"{name}.pub").write_bytes(public)
    return path


def key_folder(folder: Path, *names: str) -> Path:
    """A folder of the registered keys of these clients, below `folder`."""
    keys = folder / "keys"
    keys.mkdir()
    for name in names:
        make_key(folder, name, keys)
    return keys


@contextmanager
def running_server(
    folder: Path,
    options: str = OPTIONS,
    *,
    resume: bool = False,
    seconds: float = 180.0,
    commands: Commands | None = None,
) -> Iterator[Server]:
    """`corolla server` with `options` in folder/out; yields when clients can join.

    Certificates are in folder/certs, keys of clients in folder/keys: made unless they are there.
    With `commands` its processes, and those of its members, are forks.
    One that resumes is told its folder and `options`, not its place: it is to be where it was.
    """
    tls, keys, out = folder / "certs", folder / "keys", folder / "out"
    keys.mkdir(parents=True, exist_ok=True)
    if not tls.exists():
        certificates.make(tls, [])
    log = folder / "server.log"
    place = out / "flower" / "place.json"
    place.unlink(missing_ok=True)
    first = [*options.split(), "--address", "127.0.0.1:0"]
    first += ["--certs", str(tls), "--clients-keys", str(keys)]
    command = ["server", "--out", str(out), *(["--resume", *options.split()] if resume else first)]
    with running(command, log, commands) as process:
        deadline = time.monotonic() + seconds
        while not place.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        address = json.loads(place.read_text())["address"]
        yield Server(address, tls / "ca.pem", keys, out, process, log, commands)


@contextmanager
def running_client(
    folder: Path, server: Server, name: str, data: Path | str, options: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """`corolla client`, its state in folder/state-NAME; its key is registered."""
    state, log = folder / f"state-{name}", folder / f"{name}.log"
    command = ["client", "--server", server.address, "--root-certificates", str(server.ca)]
    command += ["--data", str(data), "--name", name, "--state", str(state), *options.split()]
    with running(command, log, server.commands) as process:
        register(state, server.keys / f"{name}.pub", process, log)
        yield process


def register(state: Path, registered: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Bring a node's public key from its state folder to the server's, once it has made it."""
    deadline = time.monotonic() + 120
    while not (found := list(state.glob("*.pub"))):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    scratch = registered.with_suffix(".part")
    scratch.write_bytes(found[0].read_bytes())
    scratch.replace(registered)


@contextmanager
def running(
    command: Sequence[str], log: Path, commands: Commands | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of corolla, its words in `log`; told to stop at the end, by its id.

    With `commands` it is a fork: the process is one that waits for it and passes signals on.
    """
    cold = [sys.executable, "-m", "corolla"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*([str(commands.bin / "corolla")] if commands else cold), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
