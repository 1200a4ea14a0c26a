"""The journal of a run: what was decided, written down before it is done (write-ahead).

`journal.jsonl` in the run's folder. A line is a JSON object with `event`, `time` (UTC), `seconds`
(how long the run has been running, resumptions included, pauses counted, not while no process ran)
and facts, sealed as corolla/host/sealed_lines.py says: no line can be changed, lost or moved
unseen. Each line is on disk before its event takes effect:

    started    run id; rounds; round and state (sha256) it starts from; roster {member: examples},
               seats {gateway: seats}; with differential privacy its unit, delta and budget
    resumed    as started: another process goes on
    joined     roster and seats of members that come after those that are known, or have changed
    planned    round, attempt, cohort {member: seats}, base_version, seed, how many are online;
               before anything is sent (of a cohort drawn by secret chance: who was drawn, and who
               of them is away)
    verdicts   round, attempt, verdicts {client: code}, why {client: reason} of those refused
    privacy    round, attempt, unit, epsilon spent so far, clients; of dp=client also neighbours,
               mechanism, noise_multiplier, clip, sampling_probability, delta; before the noise of
               a release is drawn, of dp=example before the round is committed; where rows name
               users also neighbours, users and unnamed: the clients whose rows do, and do not
    committed  round, state: sha256 of the checkpoint's tensors; after the checkpoint is on disk
    abandoned  round, attempt, why; the model is as it was
    paused     round, online, needed: too few members can be asked; ends with the next event
    stopped    why; the run can be resumed
    failed     why; the run can be resumed, but the cause should be removed first
    done       why: all rounds, or a stop condition

A crash may tear the last line: it is dropped, for what it announces has not been done. Damage
anywhere else is an error.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from corolla.errors import ArtefactError
from corolla.host import sealed_lines
from corolla.host.sealed_lines import Chained

NAME = "journal.jsonl"
ORDER = "server.json"
"""There where a server runs it: what its ServerApp is to do."""

Event = Literal[
    "started",
    "resumed",
    "joined",
    "planned",
    "verdicts",
    "privacy",
    "committed",
    "abandoned",
    "paused",
    "stopped",
    "failed",
    "done",
]
Entry = sealed_lines.Entry
_REMEDY = "restore it from a copy, or start a new run"


class Journal:
    """The open journal of one running process; a folder has one at a time.

    `note` says of a torn last line. Raises ConfigError when another process is at work in the
    folder, ArtefactError for a damaged journal or one that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        busy = f"running in {folder}: stop it, or name another folder"
        self._file = Chained(self.path, busy, _REMEDY)
        entries = self._file.content.entries
        torn = self._file.content.torn
        self.note = f"the last line of {self.path} was torn: dropped" if torn else ""
        self.past = past(entries)
        self._before = float(entries[-1]["seconds"]) if entries else 0.0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """How long this run has been running, in all its processes."""
        return self._before + time.monotonic() - self._began

    def append(self, event: Event, **facts: Any) -> None:
        """Write a line; it is on disk when this returns. Raises ArtefactError when it cannot be."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"event": event, "time": now, "seconds": round(self.seconds, 3), **facts}
        try:
            self._file.append(entry)
        except ArtefactError as error:
            raise ArtefactError(
                f"{error}; what is committed is kept: go on with --resume"
            ) from error


@dataclass(frozen=True)
class Past:
    """The facts in a journal that a run which goes on has to know."""

    roster: Mapping[str, int] = field(default_factory=dict)
    """Member → examples, in the order in which members came."""
    seats: Mapping[str, int] = field(default_factory=dict)
    """Gateway → seats."""
    committed: Mapping[int, str] | None = None
    """Round → sha256 of its state; None: there is no journal to ask."""
    plans: Mapping[int, Entry] = field(default_factory=dict)
    """Round → its last plan."""
    abandoned: Mapping[int, int] = field(default_factory=dict)
    """Round → how many attempts at it were abandoned."""
    population: int = 0
    """How many clients could take part when the run began."""
    asked: Mapping[str, int] = field(default_factory=dict)
    """Member → how many plans it was in."""
    rounds: Sequence[int] = ()
    """The numbers of rounds that were asked for, each once; more than one of an extended run."""
    privacy: Sequence[Entry] = ()
    """Entries of differential privacy, the oldest first."""

    @property
    def round(self) -> int:
        """The last committed round; 0 before the first."""
        return max(self.committed or (), default=0)

    def plan(self, round: int) -> Entry | None:
        """The plan of a round that is to be carried out (again); None when there is none."""
        plan = self.plans.get(round)
        return plan if plan and plan["attempt"] == self.attempt(round) else None

    def attempt(self, round: int) -> int:
        """The number of the attempt at a round that is not abandoned."""
        return self.abandoned.get(round, 0)


def past(entries: Sequence[Entry]) -> Past:
    """Returns the Past that the entries of a journal tell."""
    roster: dict[str, int] = {}
    seats: dict[str, int] = {}
    committed: dict[int, str] = {}
    plans: dict[int, Entry] = {}
    abandoned: dict[int, int] = {}
    asked: Counter[str] = Counter()
    population = 0
    for entry in entries:
        roster |= entry.get("roster", {})
        seats |= entry.get("seats", {})
        population = population or sum(seats.get(member, 1) for member in roster)
        match entry["event"]:
            case "started" | "resumed" | "committed":
                if entry["round"]:
                    committed[entry["round"]] = entry["state"]
            case "planned":
                plans[entry["round"]] = entry
                asked.update(entry["cohort"].keys())
            case "abandoned":
                abandoned[entry["round"]] = entry["attempt"] + 1
    return Past(
        roster,
        seats,
        committed if entries else None,
        plans,
        abandoned,
        population,
        asked,
        list(dict.fromkeys(entry["rounds"] for entry in entries if "rounds" in entry)),
        [entry for entry in entries if entry["event"] == "privacy"],
    )


def read(folder: Path) -> list[Entry]:
    """All whole lines, the oldest first; empty when there is no journal.

    Raises ArtefactError when it is damaged elsewhere than at its end.
    """
    return sealed_lines.read(folder / NAME, _REMEDY).entries


def alive(folder: Path) -> bool | None:
    """Returns whether a process is at work in a run's folder; None where that cannot be known."""
    return sealed_lines.alive(folder / NAME)


def fail_point(name: str, round: int) -> None:
    """For tests of kills: the process dies here if COROLLA_FAIL_AT is "name:round"."""
    if os.environ.get("COROLLA_FAIL_AT") == f"{name}:{round}":
        os.kill(os.getpid(), signal.SIGKILL)
