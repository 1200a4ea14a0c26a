"""`corolla client`: a trainer and a SuperNode beside it, kept alive for ever by one process.

Whatever ends one of the two, it starts again, each time a little later, until this process is told
to stop. What the owner of the device can do something about is said in one line.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Event

from corolla.client.device import supernode
from corolla.client.device.identity import identity
from corolla.client.device.settings import Own
from corolla.client.device.supernode import Link
from corolla.errors import ConfigError, CorollaError
from corolla.host import files, logs, processes
from corolla.host.processes import stoppable
from corolla.wire import rpc

Say = Callable[[str], None]

_POLL = 0.1
_GRACE = 10.0
"""Seconds in which a child that is told to end may do so."""
_LONGEST_PAUSE = 60.0
_LASTED = 120.0
"""Seconds of life after which a death is a first one again."""
_LOG_BYTES = 1 << 20
"""Of a child's words, twice that are kept."""

_log = logs.logger("client")
_dice = secrets.SystemRandom()


class Child:
    """A process whose words are kept in a log and shown, line by line, to `heard`.

    Its standard input stays open for as long as this process lives: it can tell when that is gone.
    """

    def __init__(
        self, name: str, folder: Path, heard: Callable[[str], None], env: Mapping[str, str]
    ) -> None:
        self.name, self.lines, self.deaths = name, deque[str](maxlen=50), 0
        self._log, self._note = folder / f"{name}.log", folder / f"{name}.pid"
        self._heard, self._env = heard, dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._began = self._due = 0.0
        processes.end(
            processes.noted_process(self._note), _GRACE
        )  # left by one that was killed: two would be one client twice

    def start(self, command: Sequence[str], first_line: bytes = b"") -> None:
        self.stop()
        self.lines.clear()
        self._process = process = subprocess.Popen(
            command,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends both
        )
        self._began, self._due = time.monotonic(), 0.0
        with suppress(OSError):  # a full disk
            processes.note_process(self._note, process.pid)
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        if first_line and process.stdin:
            try:
                process.stdin.write(first_line)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended already: `ended` will say so

    def ended(self) -> int | None:
        """Its exit code; None while it runs. All it has said is heard by then."""
        code = self._process.poll() if self._process else None
        if code is not None and self._reader:
            self._reader.join(5)
        return code

    def rest(self) -> float:
        """Note a death; the seconds until the next start, longer each time."""
        if not self._due:
            lasted = time.monotonic() - self._began
            self.deaths = 1 if lasted > _LASTED else self.deaths + 1
            self._due = time.monotonic() + pause(self.deaths, _dice.random())
        return self._due - time.monotonic()

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def resting(self) -> bool:
        return self._due > 0

    def stop(self) -> None:
        """End it, by its id."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if self._reader:
            self._reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not pipe.closed:
                pipe.close()
        self._process = None
        self._note.unlink(missing_ok=True)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        for raw in process.stdout or ():
            line = raw.decode(errors="replace").rstrip()
            self.lines.append(line)
            self._keep(raw)
            with suppress(OSError):  # nobody listens, or a full disk: a child must not block
                self._heard(line)

    def _keep(self, raw: bytes) -> None:
        try:
            with self._log.open("ab") as file:
                file.write(raw)
                size = file.tell()
            if size > _LOG_BYTES:
                self._log.replace(self._log.with_suffix(".log.1"))
        except OSError:  # a full disk must not end a client
            pass


def pause(deaths: int, dice: float) -> float:
    """Seconds before a child starts again; `dice` in [0, 1) keeps clients from coming together."""
    return min(_LONGEST_PAUSE, 0.5 * 2.0 ** min(deaths, 10)) * (0.5 + 0.5 * dice)


class Node:
    """A trainer and a SuperNode. `trainer` is a command that serves on the path it gets last.

    Its first words must be one line of JSON; it is told `order` on standard input. A gateway puts
    its own command in the trainer's place.
    """

    def __init__(self, link: Link, trainer: Sequence[str], order: object, say: Say) -> None:
        self.link, self._command, self._order, self._say = link, list(trainer), order, say
        self._ready: dict[str, object] | None = None
        self._inside = False
        self._told = ""
        self._joined = link.state / "joined"
        """Exists once a server has let this key in."""

    def run(self) -> None:
        """Until a signal. Raises CorollaError when the trainer cannot start at all."""
        state, key = self.link.state, self.link.key
        with stoppable() as stop, rpc.private_socket(state) as path:
            logs.configure(state / "log.jsonl")
            trainer = Child("trainer", state, self._of_trainer, os.environ)
            node = Child("supernode", state, self._of_node, supernode.environment(state))
            try:
                self._start_trainer(trainer, path)
                self._await_ready(trainer, stop)
                if not stop.is_set() and not self._joined.exists():
                    self._say(f"the owner of {self.link.server} must know {key.public}")
                while not stop.wait(_POLL):
                    self._tend_trainer(trainer, path)
                    self._tend_node(node, path)
            finally:
                self._inside = False
                node.stop()  # first: no new task comes for a trainer that goes
                trainer.stop()
                _log.info("stopped")
                logs.unconfigure()
        self._say("stopped")

    def _start_trainer(self, trainer: Child, path: Path) -> None:
        self._ready = None
        trainer.start([*self._command, str(path)], json.dumps(self._order).encode() + b"\n")

    def _await_ready(self, trainer: Child, stop: Event) -> None:
        """Returns when it serves, or a signal has come. Raises CorollaError if it cannot."""
        while self._ready is None and not stop.wait(_POLL):
            code = trainer.ended()
            if code is not None:
                error = ConfigError if code == 2 else CorollaError
                raise error(_last_words(trainer, code))

    def _tend_trainer(self, trainer: Child, path: Path) -> None:
        code = trainer.ended()
        if code is None:
            return
        if not trainer.resting:
            self._tell("warning", f"the trainer ended: {_last_words(trainer, code)}; again soon")
        if trainer.rest() <= 0:
            self._start_trainer(trainer, path)

    def _tend_node(self, node: Child, path: Path) -> None:
        code = node.ended()
        if code is None and node.started:
            return
        if code is not None and not node.resting:
            inside, self._inside = self._inside, False
            before = self._joined.exists()
            why = supernode.explain(self.link, code, list(node.lines), inside, before)
            self._tell("warning", f"{why}; trying again")
        if code is None or node.rest() <= 0:
            node.start(supernode.command(self.link, path, processes.free_port()))

    def _of_trainer(self, line: str) -> None:
        if line.startswith("note: "):
            self._tell("warning", line.removeprefix("note: "))
        elif self._ready is None and line.startswith("{"):
            try:
                self._ready = dict(json.loads(line))
            except ValueError:
                return
            facts = ", ".join(f"{k} {str(v)[:16]}" for k, v in self._ready.items())
            self._tell("info", f"{self.link.name} is ready: {facts}")

    def _of_node(self, line: str) -> None:
        if supernode.joined(line) or supernode.found(line):
            self._inside = self._inside or supernode.joined(line)
            self._joined.touch()
            self._tell("info", f"connected to {self.link.server} as {self.link.name}")
        elif supernode.lost(line) and "does not answer" not in self._told:
            why = supernode.diagnose(self.link.server, self.link.root_certificates)
            why = why or f"{self.link.server} does not answer"
            self._tell("warning", f"{why}; trying again")

    def _tell(self, level: str, line: str) -> None:
        """Every time in the log; to the user only what is new."""
        (_log.info if level == "info" else _log.warning)(line, client=self.link.name)
        if line != self._told:
            self._told = line
            self._say(line)


def begin(own: Own, say: Say) -> None:
    """Be a client until a signal. Raises CorollaError for what its owner must change first."""
    found, _ = identity(own.state)
    name = own.name or found.name
    order = {"own": own.model_dump(mode="json"), "name": name}
    trainer = [sys.executable, "-m", "corolla.client.device.daemon"]
    link = Link(own.server, own.root_certificates, name, own.state, found)
    with only_one(own.state):
        Node(link, trainer, order, say).run()


def only_one(state: Path) -> AbstractContextManager[None]:
    """A lock that ends with the process. Raises ConfigError when another client has the folder."""
    busy = f"another corolla client is at work in {state}: give this one its own --state"
    return files.only_one(state / "lock", busy)


def _last_words(child: Child, code: int) -> str:
    said = [line for line in child.lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if code < 0:
        return f"ended by signal {-code}" + (": out of memory?" if code == -9 else "")
    return (errors or said or [f"exit code {code}"])[-1]
