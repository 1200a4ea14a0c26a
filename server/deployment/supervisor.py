"""`corolla server`: everything that runs on a coordinator, from one process that ends with it.

It starts the SuperLink and its executor on loopback and the front before them, registers the keys
of clients, submits the run, and looks after all of it: children that die are started again, a run
that Flower gives up is submitted again and goes on from its last committed round. The run itself,
its journal and its checkpoints are those of the ServerApp (server/app.py).
"""

import fcntl
import json
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx
import psutil

from corolla.config.run import RunConfig
from corolla.errors import ConfigError, CorollaError, RoundError, StoppedError
from corolla.host import certificates, logs, supervised
from corolla.host.files import write_atomic
from corolla.host.processes import end, free_port, note_process, noted_process, stoppable
from corolla.host.supervised import Process
from corolla.server.deployment import superlink
from corolla.server.deployment.front import Front, fingerprint, listen
from corolla.server.deployment.order import (
    LAST_WORDS,
    OUTCOME,
    PROCESS,
    Order,
    Settings,
    read_order,
    read_outcome,
    refuse_simulated,
    refuse_unbounded,
)
from corolla.server.deployment.superlink import Control, Place
from corolla.server.runs import exporter
from corolla.server.runs.attempts import how_to_go_on
from corolla.server.runs.folder import prepare_folder

_POLL = 0.25
_LOOK = 1.0
"""Seconds between looks at keys and at what Flower says of the run."""
_START = 90.0
"""Seconds in which a SuperLink must answer."""
_BEGIN = 180.0
"""Seconds in which a ServerApp must begin: a slow machine imports for more than one minute."""
_STOP = 60.0
"""Seconds in which a ServerApp that is told to stop may end what it is at."""
_TRIES = 5
"""Submissions in a row that bring no round, after which the run is given up."""

_log = logs.logger("supervisor")


@dataclass
class Supervisor:
    """Runs until the run is done. `say` tells the user a line."""

    folder: Path
    settings: Settings
    say: Callable[[str], None]
    _keys: dict[Path, float] = field(default_factory=dict)
    """Files that have been looked at, and when they were written."""
    _complained: set[str] = field(default_factory=set)
    _registered: set[str] = field(default_factory=set)
    _noted: dict[str, int] = field(default_factory=dict)
    _told: int = 0
    _seen: tuple[int, int] | None = None
    """When metrics.jsonl was written last, and its bytes."""
    _run: int | None = None
    _submitted: float = 0.0
    _log_size: int = 0
    """Of the executor's log before this submission."""
    _tries: int = 0
    _committed: int = 0

    def run(self, order: Order, door: socket.socket | None) -> None:
        """Raises StoppedError after a signal, and CorollaError for what ends the run."""
        folder = self.folder
        for name in ("flower", "logs"):
            (folder / name).mkdir(exist_ok=True)
        with ExitStack() as ends:
            ends.enter_context(_only_one(folder))
            stop = ends.enter_context(stoppable())
            logs.configure(folder / "logs" / "supervisor.jsonl", order.run_id)
            ends.callback(logs.unconfigure)
            self._end_stale()
            place = Place(folder, self.settings.superlink_port or free_port())
            place.prepare()
            order.write(folder)
            (folder / OUTCOME).unlink(missing_ok=True)
            self._told, self._committed = len(self._lines()), self._round()
            if self.settings.metrics_port is not None:
                served = exporter.serve(folder, self.settings.metrics_port)
                ends.callback(served.stop)
                self.say(f"metrics at http://127.0.0.1:{served.port}/metrics")
            front = self._front(place, door)
            link, executor = place.processes()
            ends.callback(link.stop)
            ends.callback(executor.stop)
            ends.callback(self._end_serverapp)
            if front:
                ends.callback(front.stop)
                front.start()
            control = Control(place)
            ends.callback(control.close)
            self._await_ready(control, link, stop)
            executor.start()
            self._supervise(place, control, [link, executor], front, stop)

    def _supervise(
        self,
        place: Place,
        control: Control,
        children: list[Process],
        front: Front | None,
        stop: Event,
    ) -> None:
        due = 0.0
        while not stop.is_set():
            self._tell_rounds()
            if self._ended():
                return self.say(f"done: {self.folder}")
            self._tend(children, front)
            if time.monotonic() >= due:
                try:
                    self._register(control)
                    if self._run is None:
                        control.stop_others()
                        self._submit(control)
                        self._tell_ready(place, front)
                    elif why := self._given_up(control, self._run):
                        self._again(control, why)
                except httpx.HTTPError as error:
                    _log.warning("the SuperLink is away", why=repr(error))
                except OSError as error:  # a disk that is full, too many open files: it may pass
                    _log.warning("tried again", why=str(error))
                due = time.monotonic() + _LOOK
            stop.wait(_POLL)
        raise StoppedError(self._kept())

    def _front(self, place: Place, door: socket.socket | None) -> Front | None:
        if door is None:
            self.say(f"no front: pass Fleet calls on to https://127.0.0.1:{place.port}")
            return None
        return Front(door, self.settings.certs or Path(), place.port, place.ca)

    def _end_stale(self) -> None:
        """Processes that an earlier supervisor, killed, has left in this folder."""
        for path in (PROCESS, Path("flower", "superexec.json"), Path("flower", "superlink.json")):
            if stale := noted_process(self.folder / path):
                self.say(f"ending process {stale.pid}, left by an earlier server")
                end(stale, supervised.GRACE)
            (self.folder / path).unlink(missing_ok=True)

    def _end_serverapp(self) -> None:
        with suppress(OSError):  # it ends with its executor as well
            end(noted_process(self.folder / PROCESS), _STOP)

    def _await_ready(self, control: Control, link: Process, stop: Event) -> None:
        link.start()
        deadline = time.monotonic() + _START
        while not control.ready():
            self._tend([link], None)
            if stop.is_set():
                raise StoppedError(self._kept())
            if link.deaths >= 3 or time.monotonic() > deadline:
                raise RoundError(f"the SuperLink does not start: {link.last_line()}")
            time.sleep(_POLL)

    def _tell_ready(self, place: Place, front: Front | None) -> None:
        where = f"at {front.address}" if front else "behind your proxy"
        self.say(f"clients can join {where}; {len(self._registered)} keys are registered")
        ports = {"address": front.address if front else "", "superlink": place.port}
        write_atomic(place.home / "place.json", json.dumps(ports).encode())

    def _tend(self, children: list[Process], front: Front | None) -> None:
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
        if front and not front.alive:
            raise RoundError(f"the front has ended: see {self.folder / 'logs'}")

    def _register(self, control: Control) -> None:
        """Keys that are new in the folder; a file that is no key is said once."""
        folder = self.settings.clients_keys
        try:
            paths = sorted(folder.glob("*.pub")) if folder else []
        except OSError as error:
            self._complain(f"{folder} cannot be listed: {error}")
            return
        for path in paths:
            try:
                written = path.stat().st_mtime
                if self._keys.get(path) == written:
                    continue
                pem = certificates.public_key(path)
                new = control.register(pem)
            except (CorollaError, OSError) as error:
                self._complain(f"left out: {error}")
                if isinstance(error.__cause__ or error, OSError):
                    continue  # it may be there at the next look
            else:
                self._registered.add(path.stem)
                if new:
                    _log.info("key registered", client=path.stem, key=fingerprint(pem))
            self._keys[path] = written

    def _complain(self, text: str) -> None:
        """Say it, once."""
        if text not in self._complained:
            self._complained.add(text)
            self.say(text)
            _log.warning("key left out", why=text)

    def _submit(self, control: Control) -> None:
        log = self.folder / "logs" / "superexec.log"
        self._log_size = log.stat().st_size if log.exists() else 0
        self._submitted = time.monotonic()
        self._run = control.submit()

    def _last_words(self) -> str:
        """Why this ServerApp failed, where it could only say so in the executor's log."""
        log = supervised.tail(self.folder / "logs" / "superexec.log", self._log_size)
        said = [line.partition(LAST_WORDS)[2] for line in log.splitlines() if LAST_WORDS in line]
        return said[-1] if said else ""

    def _given_up(self, control: Control, run: int) -> str:
        """Why this run will not go on by itself; "" while it may.

        Raises CorollaError for what its ServerApp has said, OSError when nothing can be known.
        """
        note = self.folder / PROCESS
        began = note.exists()
        alive = noted_process(note) is not None
        status, details = control.status(run)
        late = not began and time.monotonic() - self._submitted > _BEGIN
        if not status.startswith("finished") and (alive or not (began or late)):
            return ""
        if self._ended():  # its outcome came meanwhile
            return ""
        if said := self._last_words():
            raise RoundError(f"{said}{how_to_go_on(self.folder)}")
        if late and not status.startswith("finished"):
            return f"its ServerApp has not begun in {_BEGIN:.0f} s"
        return details or ("its process was killed" if began else status)

    def _again(self, control: Control, why: str) -> None:
        """Submit the run again: it goes on from the last committed round. Raises RoundError."""
        if (at := self._round()) > self._committed:
            self._committed, self._tries = at, 0
        self._tries += 1
        if self._tries >= _TRIES:
            raise RoundError(
                f"the run failed {self._tries} times without a round: {why}; see "
                f"{self.folder / 'logs'}{how_to_go_on(self.folder)}"
            )
        _log.warning("submitted again", why=why, round=at)
        self.say(f"the run goes on from round {at}: {why}")
        self._end_serverapp()
        (self.folder / PROCESS).unlink(missing_ok=True)
        self._keys.clear()  # where the SuperLink has lost its database, they are new to it
        control.stop_others()
        self._submit(control)

    def _ended(self) -> bool:
        """Whether the ServerApp has said that the run is done. Raises CorollaError if it failed."""
        outcome = read_outcome(self.folder)
        if outcome is not None and outcome.status == "failed":
            kind = ConfigError if outcome.exit_code == ConfigError.exit_code else RoundError
            raise kind(outcome.error)
        return outcome is not None and outcome.status == "done"

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
                f"{line['seconds']:.1f} s" + (f", held-out loss {loss:.4f}" if loss else "")
            )
        self._told = len(lines)

    def _round(self) -> int:
        names = (path.stem for path in (self.folder / "checkpoint").glob("round-*.json"))
        return max((int(name.removeprefix("round-")) for name in names), default=0)

    def _kept(self) -> str:
        return f"stopped{how_to_go_on(self.folder)}"


class _only_one:  # noqa: N801 - a context manager
    """A lock that ends with the process. Raises ConfigError when another server has the folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "flower" / "lock"

    def __enter__(self) -> None:
        self._file = self._path.open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(
                f"another corolla server is at work in {self._path.parent.parent}"
            ) from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def begin(
    config: RunConfig,
    folder: Path,
    settings: Settings,
    *,
    keep_updates: bool,
    resume: bool,
    say: Callable[[str], None],
) -> None:
    """Serve a run in a new folder, or go on with the one in it. Raises CorollaError."""
    superlink.check_version()
    refuse_simulated(config)
    refuse_unbounded(config)
    if settings.clients_keys and not settings.clients_keys.is_dir():
        raise ConfigError(f"--clients-keys {settings.clients_keys} is no folder")
    if settings.address:
        if settings.certs is None:
            raise ConfigError("--certs DIR is missing: corolla certs DIR --host NAME makes one")
        certificates.check(settings.certs)
    if resume:
        order = read_order(folder)
    supervised.open_more_files()
    # Held before anything is written: an address that is taken leaves no folder behind.
    with ExitStack() as ends:
        door = ends.enter_context(listen(settings.address)) if settings.address else None
        if not resume:
            prepare_folder(folder, resume=False)
            order = Order(
                secrets.token_hex(16),
                config.model_dump(mode="json"),
                keep_updates,
                settings.min_clients,
                str(Path.cwd()),
                settings.max_seats,
            )
        Supervisor(folder.resolve(), settings, say).run(order, door)
