"""Conditions that a gateway and an owner set for this device: judged here, told to nobody.

The native client decides alike; both are held to the same table of cases. Needs no torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from corolla.host.files import write_atomic
from corolla.proto import device_pb2 as pb

_DAY = 86_400.0
_OLDEST = 30 * _DAY
_AHEAD = _DAY
"""Seconds: entries dated further ahead are ignored, because the clock was wrong."""
_MOST_BYTES = 1 << 20
"""Bytes of a history that are read, its last ones: what is before them is old, or a mistake."""

_WORDS = {
    "charging": "not charging",
    "unmetered": "not on an unmetered network",
    "idle": "not idle",
    "battery": "the battery is low",
    "thermal": "too warm",
    "storage": "too little storage is free",
    "examples": "too few examples",
    "daily-bytes": "today's bytes are used up",
    "daily-seconds": "today's time is used up",
    "daily-battery": "today's charge is used up",
    "separation": "it contributed a few rounds ago",
    "period": "it contributed a short time ago",
}


@dataclass(frozen=True)
class Limits:
    """The limits of an owner on 24 hours; 0: none. A gateway's limit holds where it is stricter."""

    daily_bytes: int = 0
    daily_seconds: float = 0.0
    daily_battery_percent: float = 0.0


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Entry:
    """A contribution, or a piece of work that came to none: a line of a device's history.

    `at` counts seconds since 1970, `seconds` are those at work, `bytes` go up and down, `battery`
    is in percent of a full charge.
    """

    at: float
    run: str
    round: int
    seconds: float = 0.0
    bytes: float = 0.0
    battery: float = 0.0
    accepted: bool = False


@dataclass(frozen=True)
class Spent:
    """The use of a device: bytes up and down, seconds at work, percent of a full charge."""

    bytes: float = 0.0
    seconds: float = 0.0
    battery: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.battery + other.battery,
        )


NOTHING = Spent()


def stricter(policy: pb.Policy, limits: Limits) -> pb.Policy:
    """A gateway's policy with an owner's limits; a limit that is none sets none, as 0 does."""
    both = pb.Policy()
    both.CopyFrom(policy)
    for name, own in asdict(limits).items():
        told = getattr(policy, name)
        asked = told if told > 0 else 0  # less than nothing, or no number: no limit of an owner's
        setattr(both, name, min(asked, own) if asked and own else asked or own)
    return both


def before_check_in(
    policy: pb.Policy,
    device: Mapping[str, Any],
    examples: int,
    history: Sequence[Entry],
    now: float,
    spent: Spent = NOTHING,
) -> list[str]:
    """Names the conditions of a policy that do not hold, by the words of --policy.

    `device` has fields of Capabilities, and, where it is known, "thermal"; `now` counts seconds
    since 1970; what was `spent` is not yet in the history.
    """
    full = device.get("storage_bytes", 0) < policy.storage_bytes
    return [
        *_conditions(policy, device),
        *(["storage"] if full else []),
        *(["examples"] if examples < policy.examples else []),
        *used_up(policy, spent + spent_today(history, now)),
    ]


def while_training(
    policy: pb.Policy,
    device: Mapping[str, Any],
    history: Sequence[Entry],
    now: float,
    spent: Spent,
) -> list[str]:
    """Names the conditions that fail once `spent` is added to what the history has of the day."""
    return [*_conditions(policy, device), *used_up(policy, spent + spent_today(history, now))]


def with_lease(
    policy: pb.Policy, history: Sequence[Entry], run: str, round: int, now: float
) -> list[str]:
    """Why a contribution to this round would come too soon after the last one to its run."""
    own = [entry for entry in history if entry.accepted and entry.run == run]
    near = policy.separation and any(round - past.round < policy.separation for past in own)
    early = policy.period_seconds and any(now - past.at < policy.period_seconds for past in own)
    return [*(["separation"] if near else []), *(["period"] if early else [])]


def used_up(policy: pb.Policy, spent: Spent) -> list[str]:
    """The limits of a day that are reached, 0 being none."""
    limits = {
        "daily-bytes": (policy.daily_bytes, spent.bytes),
        "daily-seconds": (policy.daily_seconds, spent.seconds),
        "daily-battery": (policy.daily_battery_percent, spent.battery),
    }
    return [name for name, (limit, used) in limits.items() if 0 < limit <= used]


def spent_today(history: Sequence[Entry], now: float) -> Spent:
    """Sums the entries of the 24 hours before `now`, in seconds since 1970."""
    today = _today(history, now)
    return Spent(
        math.fsum(entry.bytes for entry in today),
        math.fsum(entry.seconds for entry in today),
        math.fsum(entry.battery for entry in today),
    )


def in_words(lacks: Sequence[str]) -> str:
    """As "not charging, the battery is low"; "" where nothing is lacking."""
    return ", ".join(_WORDS[name] for name in lacks)


def read(path: Path, now: float) -> list[Entry]:
    """A history of the last 30 days, oldest first; what cannot be read is left out."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return []
    found = [entry for line in lines if (entry := _entry(line))]
    return [entry for entry in found if entry.at > now - _OLDEST]


def add(path: Path, entry: Entry) -> None:
    """Write a line, and drop the first beyond 1 MiB. Raises OSError.

    By its age nothing is dropped: the clock may be wrong now. What was noted while it was ahead is
    taken to be of now, so that it ends as all else does.
    """
    past = (
        replace(one, at=entry.at) if one.at > entry.at + _AHEAD else one
        for one in read(path, -math.inf)
    )
    kept = [json.dumps(asdict(one)) for one in (*past, entry)]
    write_atomic(path, ("\n".join(kept) + "\n").encode())


def _conditions(policy: pb.Policy, device: Mapping[str, Any]) -> list[str]:
    charging = bool(device.get("charging"))
    lacking = {
        "charging": policy.charging and not charging,
        "unmetered": policy.unmetered and device.get("metered"),
        "idle": policy.idle and not device.get("idle"),
        "battery": not charging and device.get("battery_percent", 0) < policy.battery_percent,
        "thermal": policy.thermal and device.get("thermal", 0) > policy.thermal,
    }
    return [name for name, lacks in lacking.items() if lacks]


def _today(history: Sequence[Entry], now: float) -> list[Entry]:
    return [entry for entry in history if now - _DAY < entry.at <= now + _AHEAD]


def _entry(line: str) -> Entry | None:
    try:
        found = json.loads(line)
        entry = Entry(**{own.name: found[own.name] for own in fields(Entry)})
        numbers = (entry.at, entry.round, entry.seconds, entry.bytes, entry.battery)
        sound = isinstance(entry.run, str) and all(math.isfinite(own) for own in numbers)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return entry if sound else None
