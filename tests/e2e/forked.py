"""Commands of Corolla without the seconds that its imports take: each a process of its own.

`Commands` starts them from a test; the scripts `corolla` and `python` in its folder `bin` do so for
a shell. They answer with few tokens and render no charts of a run's report (fork_server.py), and
the runs of documents are small ones. All of it is done by processes that are started cold, the
first of each command in test_readme.py, and, but for the tokens, by those in the process of the
tests (test_simulate.py).
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.e2e.fork_server import SMALL

MODULES = (
    "corolla",
    "corolla.client.device.daemon",
    "corolla.client.device.relay",
    "corolla.client.device.supernode",
    "corolla.evaluation.reader",
    "corolla.server.gateway.daemon",
)
"""Modules that `python -m` of the folder `bin` runs in a fork; all else is started as ever."""
CODE = {
    "flower-superexec": "from flwr.supercore.cli import flower_superexec as main; main()",
    "flower-superlink": "from flwr.superlink.cli import flower_superlink as main; main()",
    "flwr-serverapp": "from flwr.superlink.cli import flwr_serverapp as main; main()",
}
"""Programs of Flower in the folder `bin` → the code that a fork runs, as `python -c` does too."""
SERVER = Path(__file__).with_name("fork_server.py")
SCRIPT = '''#!{python} -ISu
"""Asks {socket} to run Corolla in this folder, with these streams; anything else runs as ever."""

import json
import os
import signal
import socket
import sys

words, module, code = sys.argv[1:], {module!r}, {code!r}
if not module and not code:
    own = words[words[:1] == ["-P"]:]
    if own[:1] == ["-m"] and own[1] in {modules!r}:
        module, words = own[1], own[2:]
    elif own[:1] == ["-c"] and own[1] in {codes!r}:
        code, words = own[1], own[2:]
    else:
        os.execv({python!r}, [{python!r}, *words])
order = {{
    "module": module,
    "code": code,
    "arguments": words,
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "python": {bin!r} + "/python",
    "reader": {bin!r} + "/python",
    "largest_file": 0,
}}
content = json.dumps(order).encode()
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect({socket!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda own, _: server.sendall(bytes([own])))
socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
server.sendall(content)
said = server.makefile()
said.readline()
code = int(said.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
'''


def run_line(line: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Runs a line of a document in a shell, expects success, and returns what it printed.

    An audit, whose noise is the operating system's, may refute a right claim by chance, at 95 %
    once in twenty: it fails only if it does so three times.
    """
    for attempt in range(3):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if attempt == 2 or "the claim is refuted" not in done.stdout:
            break
    assert done.returncode == 0, line + done.stdout + done.stderr
    return done.stdout


class Command:
    """One command that runs: `pid` is that of the process which does the work."""

    def __init__(
        self, order: Mapping[str, object], path: str, streams: Sequence[IO[bytes]]
    ) -> None:
        content = json.dumps(order).encode()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(path)
        numbers = [stream.fileno() for stream in streams]
        socket.send_fds(self._connection, [len(content).to_bytes(8, "big")], numbers)
        self._connection.sendall(content)
        self._said = self._connection.makefile()
        self.pid = int(self._said.readline())

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code; negative for the signal that has ended it."""
        self._connection.settimeout(seconds)
        try:
            return int(self._said.readline())
        finally:
            self.close()

    def close(self) -> None:
        """A command that still runs is killed."""
        self._said.close()
        self._connection.close()


@dataclass(frozen=True)
class Commands:
    """Starts commands as forks of one process that has imported everything."""

    socket: Path
    bin: Path
    """Holds `corolla`, and a `python` whose `-m corolla` is the same; for the PATH of a shell.

    A command reads what it has saved with that `python` too.
    """

    def environment(self, small: bool = False) -> dict[str, str]:
        """That of this process, where `corolla` is the one in `bin`; its runs may be small ones."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, **({SMALL: "1"} if small else {})}

    def start(
        self,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        output: Path,
        errors: Path | None = None,
        largest_file: int = 0,
    ) -> Command:
        """`python -m corolla` with `arguments` in `folder`; standard output and errors go to files.

        Without `errors` both go to `output`. `largest_file` is how large a file may become, in
        bytes, as if the disk were full then; 0: any size.
        """
        order = {
            "module": "corolla",
            "code": "",
            "arguments": arguments,
            "folder": str(folder),
            "environment": {**os.environ, **(environment or {})},
            "python": sys.executable,
            "reader": str(self.bin / "python"),
            "largest_file": largest_file,
        }
        with (
            Path(os.devnull).open("rb") as nothing,
            output.open("ab") as out,
            (errors or output).open("ab") as err,
        ):
            return Command(order, str(self.socket), (nothing, out, err))

    def run(self, *arguments: str, folder: Path) -> str:
        """A command that must succeed; what it has said."""
        log = folder / f"command-{len(list(folder.glob('command-*')))}.log"
        code = self.start(*arguments, folder=folder, output=log).wait(600.0)
        assert code == 0, log.read_text()
        return log.read_text()


@contextmanager
def serving(folder: Path) -> Iterator[Commands]:
    """The process that is forked, its socket and scripts in `folder`; ends at the end."""
    path, bin = folder / "socket", folder / "bin"
    bin.mkdir()
    for name in ("corolla", "python", *CODE):
        script = bin / name
        script.write_text(
            SCRIPT.format(
                python=sys.executable,
                socket=str(path),
                bin=str(bin),
                module="corolla" if name == "corolla" else "",
                code=CODE.get(name, ""),
                modules=MODULES,
                codes=tuple(CODE.values()),
            )
        )
        script.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-P", str(SERVER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "1000"},
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Commands(path, bin)
        process.stdin.close()
