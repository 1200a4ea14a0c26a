"""Numbers that a server chooses: cases that every client is tried on, see received_numbers.json."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASS = "strong"
"""The class of clients that is asked for."""

_FILE = Path(__file__).parent / "received_numbers.json"


@dataclass(frozen=True)
class Number:
    """One case: the value, as JSON text, of a key, and whether a client refuses it."""

    of: str
    key: str
    value: str
    refused: bool


def cases(*kinds: str) -> Iterator[Number]:
    """The cases of these kinds, in the order of the file."""
    for case in json.loads(_FILE.read_text())["cases"]:
        if case["of"] in kinds:
            for value in case["refused"]:
                yield Number(case["of"], case["key"], value, refused=True)
            for value in case["taken"]:
                yield Number(case["of"], case["key"], value, refused=False)


def told(settings: dict[str, Any], number: Number) -> str:
    """The settings of a task, as JSON text, with the number in its place."""
    found = json.loads(json.dumps(settings))
    found["class"] = CLASS
    own: dict[str, Any] = {}
    found["run"]["classes"] = {CLASS: own}
    place = {
        "run": found["run"],
        "private": found["run"],
        "class": own,
        "lora": found["lora"],
        "task": found,
    }
    if number.of == "private":
        found["run"].update(dp="example", noise_multiplier=1.0, epsilon=None, clip_norm=None)
    place[number.of][number.key] = "@"
    return json.dumps(found).replace('"@"', number.value)
