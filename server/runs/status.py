"""How a run stands, from its journal and metrics alone: any process may ask, at any time."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla.errors import ArtefactError
from corolla.host.text import human_bytes
from corolla.server.runs.journal import NAME, ORDER, Entry, alive, past, read

State = Literal["running", "paused", "stopped", "failed", "done"]

_SHOWN = 10
_SHOWN_CODES = {code: code for code in ("accepted", "no_answer")}


@dataclass(frozen=True)
class Member:
    """The outcome of the replies of one client, or of one device of a gateway."""

    replies: int
    accepted: int
    last: str
    why: str


@dataclass(frozen=True)
class Status:
    """The state of a run; bytes are payloads, losses those of the last round that measured them."""

    folder: str
    run: str
    state: State
    why: str
    """How it ended, or why it is paused; "" while it runs."""
    killed: bool
    """Stopped without a last word: its process was killed."""
    since: str
    """When it began, UTC."""
    seconds: float
    """It has been running, resumptions included, up to its last event."""
    round: int
    """The last committed one."""
    rounds: int
    attempt: int
    """Of the round under way, from 0."""
    abandoned: int
    """Attempts at rounds, in all."""
    resumed: int
    """How many times."""
    clients: int
    online: int | None
    bytes_up: int
    bytes_down: int
    train_loss: float | None
    eval_loss: float | None
    epsilon: float | None
    """Spent so far, of differential privacy."""
    budget: float | None
    """The most that epsilon may become; None: without end, or no differential privacy."""
    delta: float | None
    unit: str
    """Of which the data of one is protected: example or client; "" without."""
    sampling: str
    """Of clients whose data is protected: fixed or poisson; "" without."""
    neighbours: str
    """The difference between two data sets that nobody can tell apart, in words; "" without."""
    last_round_seconds: float | None
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """Code → replies."""
    members: Mapping[str, Member] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()
    """Of committed rounds, as in metrics.jsonl."""

    def to_json(self) -> dict[str, Any]:
        """For --json: all of it; the lines are those of metrics.jsonl."""
        return asdict(self)


def status(folder: Path) -> Status:
    """How the run in a folder stands. Raises ArtefactError when there is none, or it is damaged."""
    living = alive(folder)
    entries = read(folder)
    if not entries:
        waits = (folder / ORDER).is_file()
        why = "its server waits for clients" if waits else f"it has no {NAME}"
        raise ArtefactError(f"no run has begun in {folder}: {why}")
    before = past(entries)
    lines = [line for line in _lines(folder / "metrics.jsonl") if line["round"] <= before.round]
    known = [entry for entry in entries if entry["event"] in ("started", "resumed")]
    state, why, killed = _state(entries[-1], living)
    promised: Mapping[str, Any] = _last(known, "privacy") or {}
    spent = [entry for entry in entries if entry["event"] == "privacy"]
    replies = _told(entries, promised)
    members = _members(replies)
    return Status(
        folder=str(folder),
        run=str(_last(known, "run") or ""),
        state=state,
        why=why,
        killed=killed,
        since=entries[0]["time"],
        seconds=entries[-1]["seconds"],
        round=before.round,
        rounds=int(_last(known, "rounds") or 0),
        attempt=before.attempt(before.round + 1),
        abandoned=sum(entry["event"] == "abandoned" for entry in entries),
        resumed=sum(entry["event"] == "resumed" for entry in entries),
        clients=len(before.roster),
        online=_last(entries, "online"),
        bytes_up=sum(line["bytes_up"] for line in lines),
        bytes_down=sum(line["bytes_down"] for line in lines),
        train_loss=_last(lines, "train_loss"),
        eval_loss=_last(lines, "eval_loss"),
        epsilon=_epsilon(entries, lines),
        budget=promised.get("budget"),
        delta=promised.get("delta"),
        unit=str(_last([promised, *spent], "unit") or ""),
        sampling=str(promised.get("sampling", "")),
        neighbours=str(_last([promised, *spent], "neighbours") or ""),
        last_round_seconds=_last(lines, "seconds"),
        verdicts=dict(sorted(Counter(c for e in replies for c in e["verdicts"].values()).items())),
        members=members,
        lines=lines,
    )


def _state(last: Entry, living: bool | None) -> tuple[State, str, bool]:
    """(state, why, killed): what the last line says, unless nobody is there to act on it."""
    event, why = last["event"], str(last.get("why", ""))
    if event == "done":
        return "done", why, False
    if event == "failed":
        return "failed", why, False
    if event == "stopped":
        return "stopped", why.removeprefix("stopped; "), False
    if living is False:
        why = "its process was killed: unless its server is starting it again, --resume goes on"
        return "stopped", why, True
    if event == "paused":
        return "paused", f"{last['online']} clients online, {last['needed']} are needed", False
    return "running", "", False


def _told(entries: Sequence[Entry], promised: Mapping[str, Any]) -> list[Entry]:
    """Returns the verdicts on replies as far as privacy allows.

    Of clients that are protected they do not say why; of secret cohorts there are none.
    """
    verdicts = [entry for entry in entries if entry["event"] == "verdicts"]
    if promised.get("unit") != "client":
        return verdicts
    if promised.get("sampling") == "poisson":
        return []
    return [
        {
            **entry,
            "verdicts": {m: _SHOWN_CODES.get(c, "refused") for m, c in entry["verdicts"].items()},
            "why": dict.fromkeys(entry["why"], "not told, for the sake of privacy"),
        }
        for entry in verdicts
    ]


def _members(replies: Sequence[Entry]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for entry in replies:
        for name, code in entry["verdicts"].items():
            last = found.get(name, Member(0, 0, "", ""))
            accepted = code == "accepted"
            why = last.why if accepted else f"round {entry['round']}: {entry['why'].get(name, '')}"
            found[name] = Member(last.replies + 1, last.accepted + accepted, code, why)
    return dict(sorted(found.items()))


def _epsilon(entries: Sequence[Entry], lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the epsilon that is spent: the journal knows it before the metrics do."""
    spent: float | None = _last(
        [entry for entry in entries if entry["event"] == "privacy"], "epsilon"
    )
    told: float | None = _last(lines, "epsilon")
    return told if spent is None else spent


def _last(facts: Sequence[Mapping[str, Any]], key: str) -> Any:
    """The last value of a key that is there; None without one."""
    return next((f[key] for f in reversed(facts) if f.get(key) is not None), None)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        if all(line.keys() >= {"round", "bytes_up", "bytes_down"} for line in lines):
            return lines
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    raise ArtefactError(f"{path} is damaged: a line lacks round or bytes")


_COLOURS = {"running": "green", "done": "green", "paused": "yellow", "stopped": "yellow"}


def print_status(console: Console, found: Status) -> None:
    """A table of the run, one of its last rounds, and whose replies were refused last."""
    table = Table(title=_shown(found.folder), title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    colour = _COLOURS.get(found.state, "red")
    why = f": {_shown(found.why)}" if found.why else ""
    table.add_row("state", f"[{colour}]{found.state}[/]{why}")
    table.add_row("round", f"{found.round} of {found.rounds}" + _tries(found))
    table.add_row("time", f"{found.seconds:,.0f} s since {found.since}" + _resumed(found))
    online = "" if found.online is None else f", {found.online} online at the last look"
    table.add_row("clients", f"{found.clients}{online}")
    none = "not told" if found.sampling == "poisson" else "none"
    table.add_row("replies", ", ".join(f"{n} {c}" for c, n in found.verdicts.items()) or none)
    up, down = human_bytes(found.bytes_up), human_bytes(found.bytes_down)
    table.add_row("bytes", f"up {up}, down {down}")
    table.add_row("loss", f"training {_loss(found.train_loss)}, held-out {_loss(found.eval_loss)}")
    if found.unit or found.epsilon is not None:
        table.add_row("epsilon", _spent(found))
    console.print(table)
    if found.lines:
        console.print(_rounds(found.lines[-_SHOWN:]))
    refused = [(name, m) for name, m in found.members.items() if m.last != "accepted"]
    for name, member in refused[:_SHOWN]:
        console.print(
            f"{_shown(name)}: {member.accepted} of {member.replies} accepted; {_shown(member.why)}",
            highlight=False,
        )
    if len(refused) > _SHOWN:
        console.print(f"and {len(refused) - _SHOWN} more: --json has them all", highlight=False)


def _spent(found: Status) -> str:
    """'3.1 of 8, to add or remove one example, at delta 1e-05'."""
    spent = f"{found.epsilon or 0:.4g}"
    budget = "" if found.budget is None else f" of {found.budget:g}"
    of = f", to {found.neighbours}, at delta {found.delta:g}" if found.neighbours else ""
    return f"{spent}{budget}{of}"


def _rounds(lines: Sequence[Mapping[str, Any]]) -> Table:
    private = any(line.get("epsilon") is not None for line in lines)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("round", "clients", "dropped", "training", "held-out", "up", "down", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    if private:
        table.add_column("epsilon", justify="right")
    for line in lines:
        table.add_row(
            str(line["round"]),
            *(str(line.get(name, "-")) for name in ("clients", "dropped")),
            *(_loss(line.get(name)) for name in ("train_loss", "eval_loss")),
            *(human_bytes(line[name]) for name in ("bytes_up", "bytes_down")),
            f"{line.get('seconds', 0):.1f}",
            *([_loss(line.get("epsilon"))] if private else []),
        )
    return table


def _shown(text: str) -> str:
    """Text of others as a terminal may get it: no markup, no control characters."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tries(found: Status) -> str:
    under_way = f", attempt {found.attempt + 1} at the next" if found.attempt else ""
    return (f"; {found.abandoned} attempts abandoned" if found.abandoned else "") + under_way


def _resumed(found: Status) -> str:
    return f", resumed {found.resumed} times" if found.resumed else ""
