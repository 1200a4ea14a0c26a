"""`corolla client`: a trainer and a SuperNode beside it, kept alive for ever by one process.

Whatever ends one of the two, it starts again, each time a little later, until this process is told
to stop. What the owner of the device can do something about is said in one line.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event

from corolla.client.device import supernode
from corolla.client.device.identity import identity
from corolla.client.device.settings import Own
from corolla.client.device.supernode import Link
from corolla.errors import ConfigError, CorollaError
from corolla.host import files, logs, processes
from corolla.host.processes import stoppable
from corolla.host.supervised import Child, Restarts, stop
from corolla.wire import rpc

Say = Callable[[str], None]

_POLL = 0.1
_GRACE = 10.0
"""Seconds in which a child that is told to end may do so."""
_LONGEST_PAUSE = 60.0
"""Seconds of the longest pause before a child starts again."""

_log = logs.logger("client")
_dice = secrets.SystemRandom()


def make_child(
    name: str, folder: Path, listener: Callable[[str], None], env: Mapping[str, str]
) -> Child:
    """A child with its log and its note in `folder`, after the end of one that was left there."""
    note = folder / f"{name}.pid"
    # Left by a parent that was killed: two would be one client twice.
    processes.end(processes.noted_process(note), _GRACE)
    restarts = Restarts(_LONGEST_PAUSE, _dice.random)
    log = folder / f"{name}.log"
    return Child((), log, env=dict(env), listener=listener, note=note, restarts=restarts)


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
        with stoppable() as asked, rpc.private_socket(state) as path:
            logs.configure(state / "log.jsonl")
            trainer = make_child("trainer", state, self._of_trainer, os.environ)
            env = supernode.environment(state)
            node = make_child("supernode", state, self._of_node, env)
            try:
                self._start_trainer(trainer, path)
                self._await_ready(trainer, asked)
                if not asked.is_set() and not self._joined.exists():
                    self._say(f"the owner of {self.link.server} must know {key.public}")
                while not asked.wait(_POLL):
                    self._tend_trainer(trainer, path)
                    self._tend_node(node, path)
            finally:
                self._inside = False
                stop([node], _GRACE)  # first: no new task comes for a trainer that goes
                stop([trainer], _GRACE)
                _log.info("stopped")
                logs.unconfigure()
        self._say("stopped")

    def _start_trainer(self, trainer: Child, path: Path) -> None:
        self._ready = None
        trainer.command = [*self._command, str(path)]
        trainer.start(json.dumps(self._order).encode() + b"\n")

    def _await_ready(self, trainer: Child, asked: Event) -> None:
        """Returns when it serves, or a signal has come. Raises CorollaError if it cannot."""
        while self._ready is None and not asked.wait(_POLL):
            if trainer.ended():
                error = ConfigError if trainer.code == 2 else CorollaError
                raise error(trainer.last_words())

    def _tend_trainer(self, trainer: Child, path: Path) -> None:
        if not trainer.ended():
            return
        if not trainer.restarts.resting:
            self._tell("warning", f"the trainer ended: {trainer.last_words()}; again soon")
        if trainer.restarts.rest() <= 0:
            self._start_trainer(trainer, path)

    def _tend_node(self, node: Child, path: Path) -> None:
        if node.pid is not None:
            return
        code = node.code
        if code is not None and not node.restarts.resting:
            inside, self._inside = self._inside, False
            before = self._joined.exists()
            why = supernode.explain(self.link, code, list(node.lines), inside, before)
            self._tell("warning", f"{why}; trying again")
        if code is None or node.restarts.rest() <= 0:
            node.command = supernode.command(self.link, path, processes.free_port())
            node.start()

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
    processes.bypass_proxies()
    found, _ = identity(own.state)
    name = own.name or found.name
    order = {"own": own.model_dump(mode="json"), "name": name}
    trainer = [sys.executable, "-m", "corolla.client.device.daemon"]
    supernode.trusting(own.root_certificates)  # or the SuperNode would be started for ever
    link = Link(own.server, own.root_certificates, name, own.state, found)
    with only_one(own.state):
        Node(link, trainer, order, say).run()


def only_one(state: Path) -> AbstractContextManager[None]:
    """A lock that ends with the process. Raises ConfigError when another client has the folder."""
    busy = f"another corolla client is at work in {state}: give this one its own --state"
    return files.only_one(state / "lock", busy)
