"""The run of a folder as Flower executes it: submitted, and again when Flower gives it up."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from corolla.errors import ConfigError, RoundError
from corolla.host import logs, supervised
from corolla.host.processes import end, noted_process
from corolla.server.deployment.order import LAST_WORDS, PROCESS, read_outcome
from corolla.server.deployment.superlink import Control
from corolla.server.runs.attempts import how_to_go_on

_BEGIN = 180.0
"""Seconds in which a ServerApp must begin: a slow machine imports for more than one minute."""
_STOP = 60.0
"""Seconds in which a ServerApp that is told to stop may end what it is at."""
_TRIES = 5
"""Submissions in a row that bring no round, after which the run is given up."""

_log = logs.logger("supervisor")


class Submission:
    """The run of a folder, once it is submitted. `say` tells the user a line."""

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._say, self._clock = folder, say, clock
        self._run: int | None = None
        self._since = 0.0
        self._log_size = 0  # of the executor's log before this submission
        self._tries = 0
        self._committed = self._round()

    @property
    def begun(self) -> bool:
        """True where the run has been submitted."""
        return self._run is not None

    def begin(self, control: Control) -> None:
        """Submit the run, in place of those that an earlier server has left."""
        control.stop_others()
        log = self._folder / "logs" / "superexec.log"
        self._log_size = log.stat().st_size if log.exists() else 0
        self._since = self._clock()
        self._run = control.submit()

    def again(self, control: Control, why: str) -> None:
        """Submit the run again: it goes on from the last committed round. Raises RoundError."""
        if (at := self._round()) > self._committed:
            self._committed, self._tries = at, 0
        self._tries += 1
        if self._tries >= _TRIES:
            raise RoundError(
                f"the run failed {self._tries} times without a round: {why}; see "
                f"{self._folder / 'logs'}{how_to_go_on(self._folder)}"
            )
        _log.warning("submitted again", why=why, round=at)
        self._say(f"the run goes on from round {at}: {why}")
        self.end_process()
        (self._folder / PROCESS).unlink(missing_ok=True)
        self.begin(control)

    def ended(self) -> bool:
        """Returns whether the ServerApp has said that the run is done.

        Raises CorollaError if it failed.
        """
        outcome = read_outcome(self._folder)
        if outcome is not None and outcome.status == "failed":
            kind = ConfigError if outcome.exit_code == ConfigError.exit_code else RoundError
            raise kind(outcome.error)
        return outcome is not None and outcome.status == "done"

    def given_up(self, control: Control) -> str:
        """Why the run will not go on by itself; "" while it may, or is not submitted yet.

        Raises CorollaError for what its ServerApp has said, OSError when nothing can be known.
        """
        if self._run is None:
            return ""
        note = self._folder / PROCESS
        began = note.exists()
        alive = noted_process(note) is not None
        status, details = control.status(self._run)
        late = not began and self._clock() - self._since > _BEGIN
        if not status.startswith("finished") and (alive or not (began or late)):
            return ""
        if self.ended():  # its outcome came meanwhile
            return ""
        if said := self._last_words():
            raise RoundError(f"{said}{how_to_go_on(self._folder)}")
        if late and not status.startswith("finished"):
            return f"its ServerApp has not begun in {_BEGIN:.0f} s"
        return details or ("its process was killed" if began else status)

    def end_process(self) -> None:
        """End the ServerApp, which may take it a while."""
        with suppress(OSError):  # it ends with its executor as well
            end(noted_process(self._folder / PROCESS), _STOP)

    def _last_words(self) -> str:
        """Why this ServerApp failed, where it could only say so in the executor's log."""
        log = supervised.tail(self._folder / "logs" / "superexec.log", self._log_size)
        said = [line.partition(LAST_WORDS)[2] for line in log.splitlines() if LAST_WORDS in line]
        return said[-1] if said else ""

    def _round(self) -> int:
        """The last committed round; 0 before the first."""
        names = (path.stem for path in (self._folder / "checkpoint").glob("round-*.json"))
        return max((int(name.removeprefix("round-")) for name in names), default=0)
