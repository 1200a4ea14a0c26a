"""flower-supernode as a child of `corolla client`: its command, and what its words mean.

    python -m corolla.client.device.supernode ARGUMENTS OF flower-supernode

runs it so that it leaves the federation when the process that started it is gone: a SuperNode that
is killed is refused for a minute when it comes back, one that says goodbye is not.

Flower 1.41 ends a SuperNode for reasons that pass (the server forgot it, its last connection still
counts as alive), often with exit code 0. `explain` turns each into one line.
"""

import json
import os
import shlex
import signal
import ssl
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from corolla.client.device.identity import Identity
from corolla.errors import ConfigError
from corolla.host.processes import when_orphaned

_AHEAD, _BEHIND = 5.0, 300.0
"""Seconds by which Flower lets a node's clock be ahead and behind."""


@dataclass(frozen=True)
class Link:
    """How a node of a federation reaches it: a client, or a gateway."""

    server: str
    """HOST:PORT"""
    root_certificates: Path | None
    name: str
    state: Path
    key: Identity


def command(link: Link, socket: Path, port: int) -> list[str]:
    """Returns the command line that starts a SuperNode; `port` of loopback is for its processes."""
    words = ["--superlink", link.server, "--auth-supernode-private-key", str(link.key.private)]
    if link.root_certificates:
        words += ["--root-certificates", str(link.root_certificates)]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    told = {"socket": str(socket), "name": link.name}
    words += ["--node-config", " ".join(f"{key}={json.dumps(v)}" for key, v in told.items())]
    return [sys.executable, "-P", "-m", "corolla.client.device.supernode", *words]


def environment(state: Path) -> Mapping[str, str]:
    """Its environment, after writing the programs that it may start: ours, not a bundle's."""
    programs = state / "bin"
    programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    python = shlex.quote(sys.executable)
    superexec = "from flwr.supercore.cli import flower_superexec as main; main()"
    for name, words in {
        "flower-superexec": f"-c {shlex.quote(superexec)}",
        "flwr-clientapp": "-m corolla.client.device.relay",
    }.items():
        path = programs / name
        # Their warnings would pass for those of the SuperNode, with which they share its output.
        text = f'#!/bin/sh\nexport FLWR_LOG_LEVEL=ERROR\nexec {python} -P {words} "$@"\n'
        if path.exists() and path.read_text() == text:  # also on a full disk
            continue
        scratch = path.with_suffix(".part")
        scratch.write_text(text)
        scratch.chmod(stat.S_IRWXU)
        scratch.replace(path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    return {
        **kept,
        "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PYTHONUNBUFFERED": "1",
    }


def joined(line: str) -> bool:
    """Returns whether a line of the SuperNode's output says that the server has let it in."""
    return "SuperNode ID:" in line


def lost(line: str) -> bool:
    """Returns whether a line says that the SuperNode has lost the server.

    It tries again by itself, for ever.
    """
    return "Connection attempt failed, retrying" in line


def found(line: str) -> bool:
    """Returns whether a line says that the SuperNode has the server again."""
    return "Connection successful after" in line


def explain(link: Link, code: int, lines: Sequence[str], inside: bool, before: bool) -> str:
    """Why it ended, in one line: `inside` when it had joined, `before` when it ever has.

    Asks the server for the time where its own words leave the cause open.
    """
    text = "\n".join(lines)
    if "address already in use" in text or "HTTP API failed to start" in text:
        return "its local port was taken: another one is chosen"
    if "Exit Code: 606" in text:
        told = next((line for line in lines if "version" in line and "mismatch" in line), "")
        return f"incompatible version: {told.strip() or 'of Flower'}; install the server's corolla"
    if "code: 2004" in text or "code: 2001" in text:
        register = f"ask the owner of {link.server} to register {link.key.public}"
        if before:
            return (
                f"{link.server} still counts the last connection as alive, for up to a minute; "
                f"if this goes on, its key is no longer registered: {register}"
            )
        return f"{link.server} does not know this client: {register}"
    if code < 0:
        return f"the SuperNode ended by signal {-code}"
    why = diagnose(link.server, link.root_certificates)
    if why:
        return why
    if code == 0 and inside:
        return f"{link.server} has forgotten this connection: it was started again, or reset"
    if code == 0:
        return f"{link.server} refuses the signature of this client"
    if "Exit Code: 305" in text:
        after = [line.strip() for line in lines[_index(lines, "Exit Code: 305") + 2 :]]
        return f"{link.server} refuses this client: {next((t for t in after if t), 'no reason')}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"the SuperNode ended with code {code}: {last[:200]}"


def trusting(ca: Path | None) -> ssl.SSLContext:
    """A context that trusts the certificates of a file, or the system's without one.

    Raises ConfigError for a file that cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--root-certificates {ca} cannot be used: {_reason(error)}") from error


def diagnose(server: str, ca: Path | None, timeout: float = 10.0) -> str:
    """Returns the cause that keeps a device from a server, in one line; "" when none is found."""
    host, _, port = server.rpartition(":")
    try:
        context = trusting(ca)
    except ConfigError as error:  # it was there when the client began
        return str(error)
    connection = HTTPSConnection(host.strip("[]"), int(port), timeout=timeout, context=context)
    try:
        before = datetime.now(UTC)
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of {server} does not fit --root-certificates {ca or '(the system)'}: "
            f"{error.verify_message.rstrip('.')}"
        )
    except ssl.SSLError as error:
        return f"{server} does not speak TLS: {_reason(error)}"
    except UnicodeError:  # a name such as a..b
        return f"{server} has no host name that can be looked up"
    except (OSError, HTTPException) as error:
        return f"{server} does not answer: {_reason(error)}"
    finally:
        connection.close()
    return _clock(date, before)


def _clock(date: str | None, now: datetime) -> str:
    try:
        ahead = (now - parsedate_to_datetime(date or "")).total_seconds()
    except (ValueError, TypeError):
        return ""
    if -_BEHIND < ahead < _AHEAD + 1:  # the server's clock is told in whole seconds
        return ""
    side = "ahead of" if ahead > 0 else "behind"
    return f"the clock of this device is {abs(ahead):.0f} s {side} the server's: set it"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _index(lines: Sequence[str], text: str) -> int:
    return next((i for i, line in enumerate(lines) if text in line), 0)


def main() -> None:
    """flower-supernode with the arguments of this process."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    when_orphaned(lambda: os.kill(os.getpid(), signal.SIGTERM))
    flower_supernode()


if __name__ == "__main__":
    main()
