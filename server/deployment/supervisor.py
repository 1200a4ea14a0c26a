"""`corolla server`: everything that runs on a coordinator, from one process that ends with it.

It starts the SuperLink and its executor on loopback and the front before them, registers the keys
of clients, submits the run, and looks after all of it: children that die are started again, a run
that Flower gives up is submitted again and goes on from its last committed round. The run itself,
its journal and its checkpoints are those of the ServerApp (server/app.py).
"""

import json
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import httpx
import psutil

from corolla.artefacts.sizes import sentence
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, RoundError, StoppedError
from corolla.host import certificates, logs, supervised
from corolla.host.files import only_one, write_atomic
from corolla.host.processes import (
    bypass_proxies,
    end,
    free_port,
    note_process,
    noted_process,
    stoppable,
)
from corolla.host.supervised import Child, stop
from corolla.server.deployment import exporter, front, members, superlink
from corolla.server.deployment.keys import ClientKeys
from corolla.server.deployment.order import (
    OUTCOME,
    PROCESS,
    RunOrder,
    ServerSettings,
    read_order,
    refuse_simulated,
    refuse_unbounded,
)
from corolla.server.deployment.submission import Submission
from corolla.server.deployment.superlink import Control, Place
from corolla.server.runs.attempts import how_to_go_on
from corolla.server.runs.folder import prepare_folder, stored_warnings

_POLL = 0.25
_LOOK = 1.0
"""Seconds between looks at keys and at what Flower says of the run."""
_START = 90.0
"""Seconds in which a SuperLink must answer."""
_GRACE = 15.0
"""Seconds in which a process that is told to end may do so."""

_log = logs.logger("supervisor")


class Supervisor:
    """Keeps the processes of a run going until it is done, and tells the user of its rounds."""

    def __init__(self, folder: Path, settings: ServerSettings, say: Callable[[str], None]) -> None:
        """`say` tells the user a line."""
        self.folder, self.settings, self.say = folder, settings, say
        self._keys = ClientKeys(settings.clients_keys, say)
        self._submission = Submission(folder, say)
        self._noted: dict[str, int] = {}  # child → its process id, as it is on disk
        self._address = ""  # of the front
        self._told = 0  # rounds of metrics.jsonl
        self._seen: tuple[int, int] | None = None  # when that was written last, and its bytes

    def run(self, order: RunOrder, door: socket.socket | None) -> None:
        """Raises StoppedError after a signal, and CorollaError for what ends the run."""
        folder = self.folder
        for name in ("flower", "logs"):
            (folder / name).mkdir(exist_ok=True)
        with ExitStack() as ends:
            lock, busy = (
                folder / "flower" / "lock",
                f"another corolla server is at work in {folder}",
            )
            ends.enter_context(only_one(lock, busy))
            asked = ends.enter_context(stoppable())
            logs.configure(folder / "logs" / "supervisor.jsonl", order.run_id)
            ends.callback(logs.unconfigure)
            self._end_stale()
            place = Place(folder, self.settings.superlink_port or free_port())
            place.prepare()
            (folder / OUTCOME).unlink(missing_ok=True)
            self._told = len(self._lines())
            metrics_port = self._serve_metrics(ends)
            self._address = front.bound(door) if door else ""
            had = {"address": self._address, "metrics_port": metrics_port}
            self.settings.model_copy(update=had).write(folder)
            keys = self.settings.clients_keys
            replace(order, clients_keys=str(keys.resolve()) if keys else "").write(folder)
            link, executor = place.processes()
            ends.callback(stop, [link], _GRACE)
            ends.callback(stop, [executor], _GRACE)
            ends.callback(self._submission.end_process)
            children = [link, executor]
            if door:
                children.append(self._front(place, door, order.run_id))
                ends.callback(stop, children[2:], _GRACE)
            else:
                self.say(f"no front: pass Fleet calls on to https://127.0.0.1:{place.port}")
            control = Control(place)
            ends.callback(control.close)
            self._await_ready(control, link, asked)
            executor.start()
            self._supervise(place, control, children, asked)

    def _supervise(
        self,
        place: Place,
        control: Control,
        children: list[Child],
        asked: Event,
    ) -> None:
        due = 0.0
        while not asked.is_set():
            self._tell_rounds()
            if self._submission.ended():
                self._tell_proof()
                for text in stored_warnings(self.folder):
                    self.say(f"warning: {text}")
                return self.say(f"done: {self.folder}")
            self._tend(children)
            if time.monotonic() >= due:
                try:
                    self._look(place, control)
                except httpx.HTTPError as error:
                    _log.warning("the SuperLink is away", why=repr(error))
                except OSError as error:  # a disk that is full, too many open files: it may pass
                    _log.warning("tried again", why=str(error))
                due = time.monotonic() + _LOOK
            asked.wait(_POLL)
        raise StoppedError(self._kept())

    def _look(self, place: Place, control: Control) -> None:
        """At keys, and at what Flower says of the run."""
        self._keys.register(control)
        if not self._submission.begun:
            self._submission.begin(control)
            self._tell_ready(place)
        elif why := self._submission.given_up(control):
            self._keys.forget()
            self._submission.again(control, why)

    def _serve_metrics(self, ends: ExitStack) -> int | None:
        """Serve metrics until `ends` close; the port, None when nobody wants them."""
        if self.settings.metrics_port is None:
            return None
        served = exporter.serve(self.folder, self.settings.metrics_port)
        ends.callback(served.stop)
        self.say(f"metrics at http://127.0.0.1:{served.port}/metrics")
        return served.port

    def _front(self, place: Place, door: socket.socket, run_id: str) -> Child:
        certs = self.settings.certs or Path()
        started = front.process(door, certs, place.port, place.ca, self.folder / "logs", run_id)
        started.start()
        return started

    def _end_stale(self) -> None:
        """Processes that an earlier supervisor, killed, has left in this folder."""
        children = (Path("flower", f"{name}.json") for name in ("superexec", "superlink", "front"))
        for path in (PROCESS, *children):
            if stale := noted_process(self.folder / path):
                self.say(f"ending process {stale.pid}, left by an earlier server")
                end(stale, _GRACE)
            (self.folder / path).unlink(missing_ok=True)

    def _await_ready(self, control: Control, link: Child, asked: Event) -> None:
        link.start()
        deadline = time.monotonic() + _START
        while not control.ready():
            self._tend([link])
            if asked.is_set():
                raise StoppedError(self._kept())
            if link.restarts.deaths >= 3 or time.monotonic() > deadline:
                said = link.last_line() or "it has said nothing"
                raise RoundError(f"the SuperLink does not start: {said}; {control.answer}")
            time.sleep(_POLL)

    def _tell_ready(self, place: Place) -> None:
        where = f"at {self._address}" if self._address else "behind your proxy"
        self.say(f"clients can join {where}; {len(self._keys.registered)} keys are registered")
        ports = {"address": self._address, "superlink": place.port}
        write_atomic(place.home / "place.json", json.dumps(ports).encode())

    def _tend(self, children: list[Child]) -> None:
        for child in children:
            try:
                if told := child.tend():
                    self.say(told)
                    _log.warning("child ended", child=child.name, why=told)
                if child.pid is not None and self._noted.get(child.name) != child.pid:
                    path = self.folder / "flower" / f"{child.name}.json"
                    note_process(path, child.pid)
                    self._noted[child.name] = child.pid
            except (OSError, psutil.Error) as error:
                _log.warning("child not looked after", child=child.name, why=str(error))

    def _lines(self) -> list[str]:
        try:
            return (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []

    def _tell_rounds(self) -> None:
        """A line for each round that is new in metrics.jsonl."""
        try:
            found = (self.folder / "metrics.jsonl").stat()
            if self._seen == (found.st_mtime_ns, found.st_size):
                return
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return
        self._seen = found.st_mtime_ns, found.st_size
        for line in map(json.loads, lines[self._told :]):
            loss = line.get("eval_loss")
            self.say(
                f"round {line['round']}: {line['clients']} clients, {line['dropped']} dropped, "
                f"{line['seconds']:.1f} s"
                + (f", held-out loss {loss:.4f}" if loss else "")
                + (f", max-rank cut {line['rank_error']:.2%} off" if "rank_error" in line else "")
            )
        self._told = len(lines)

    def _tell_proof(self) -> None:
        """Says ranks and sizes, and what was proven of the saved model, where run.json has them."""
        with suppress(OSError, ValueError, KeyError):
            info = json.loads((self.folder / "run.json").read_text())
            self.say(f"what is saved is what was trained: {info['reload']['claim']}")
            self.say(sentence(info["served"]))

    def _kept(self) -> str:
        return f"stopped{how_to_go_on(self.folder)}"


def begin(
    config: RunConfig,
    folder: Path,
    settings: ServerSettings,
    *,
    keep_updates: bool,
    resume: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Serve a run in a new folder, or go on with the one in it: what the run warns of.

    Raises CorollaError.
    """
    superlink.check_version()
    bypass_proxies()
    refuse_simulated(config)
    refuse_unbounded(config)
    if settings.clients_keys and not settings.clients_keys.is_dir():
        raise ConfigError(f"--clients-keys {settings.clients_keys} is no folder")
    if settings.clients_keys:
        members.read(settings.clients_keys)
        if resume:
            members.check_there(settings.clients_keys)
    if settings.address:
        if settings.certs is None:
            raise ConfigError("--certs DIR is missing: corolla certs DIR --host NAME makes one")
        certificates.check(settings.certs)
    if resume:  # with more rounds, it may be
        order = replace(read_order(folder), config=config.model_dump(mode="json"))
    supervised.open_more_files()
    # Held before anything is written: an address that is taken leaves no folder behind.
    with ExitStack() as ends:
        door = ends.enter_context(front.listen(settings.address)) if settings.address else None
        if not resume:
            prepare_folder(folder, resume=False)
            order = RunOrder(
                secrets.token_hex(16),
                config.model_dump(mode="json"),
                keep_updates,
                settings.min_clients,
                str(Path.cwd()),
                settings.max_seats,
            )
        Supervisor(folder.resolve(), settings, say).run(order, door)
    return stored_warnings(folder)
