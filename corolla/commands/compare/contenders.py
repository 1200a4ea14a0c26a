"""Contenders of a comparison: strategies, each with settings of its own, and two baselines.

`NAME@key=value,key=value` is a strategy with settings, as `--set` would give them. `local` is each
client alone; `global` is one client that has the training rows of all.
"""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from corolla.config.sections.dataset import Dataset
from corolla.config.sections.evaluation import Evaluation
from corolla.errors import ConfigError
from corolla.strategies.listing import registry

Baseline = Literal["local", "global"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
ALONE = "corolla.strategies.local:Local"
"""The strategy of `local`, which is none to choose for its result."""

SHARED = frozenset(
    {
        *("strategy", "model", "data", "seed", "clients", "cohort", "selection", "availability"),
        *Dataset.__annotations__,
        *Evaluation.__annotations__,
    }
)
"""Keys that are the same for all: data, sampled clients and what is measured are what is equal."""

_SETTINGS = re.compile(r"@(?=[A-Za-z_][\w.-]*=)")
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=@+-]{0,79}")
"""Names that can be part of a file's name on any system."""


@dataclass(frozen=True)
class Contender:
    """A strategy with settings of its own, or a baseline."""

    label: str
    """The name in tables, plots and files."""
    strategy: str
    settings: tuple[str, ...] = ()
    """KEY=VALUE, as --set takes them."""
    baseline: Baseline | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its settings, as the configuration writes them."""
        return tuple(_key(setting) for setting in self.settings)


def contender(text: str) -> Contender:
    """`NAME`, or `NAME@key=value,key=value`. Raises ConfigError for what cannot be read."""
    name, *rest = _SETTINGS.split(text, maxsplit=1)
    if (not rest and text.rstrip().endswith("@")) or not name:
        raise ConfigError(f"contender {text!r}: expected NAME or NAME@key=value,key=value")
    settings = tuple(_split(rest[0], text)) if rest else ()
    for setting in settings:
        if _key(setting) in SHARED:
            raise ConfigError(
                f"contender {text!r}: {_key(setting)} is the same for all that are compared: give "
                f"it once, with --set or its option"
            )
    label = registry.label(name)
    shown = ",".join(f"{_key(own)}={own.partition('=')[2].strip()}" for own in settings)
    return Contender(f"{label}@{shown}" if shown else label, name, settings)


def baselines(text: str) -> list[Contender]:
    """`local,global` of --with. Raises ConfigError for another name."""
    found = []
    for name in [part.strip() for part in text.split(",") if part.strip()]:
        if name not in BASELINES:
            raise ConfigError(f"--with {text}: expected {' or '.join(BASELINES)}, found {name!r}")
        if name == "local":
            found.append(Contender(name, ALONE, (), "local"))
        else:
            found.append(Contender(name, "fedavg", ("pooled=true", "cohort=null"), "global"))
    return found


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """Label → a name for files, each another: the label itself where every system can have it."""
    folded = [label.casefold() for label in labels]
    return {
        label: label
        if _SAFE.fullmatch(label) and folded.count(label.casefold()) == 1
        else f"{_cut(label)}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        for label in labels
    }


def of_others(settings: Collection[str], chosen: str) -> list[str]:
    """The settings without options of single strategies that are not the chosen one."""
    others = registry.STRATEGIES.keys() - {chosen.replace("-", "_")}
    return [
        s for s in settings if s.partition("=")[0].replace("-", "_").split(".")[0] not in others
    ]


def _cut(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.,=@+-]|^[^A-Za-z0-9_]", "_", label)[:70]


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip().replace("-", "_")


def _split(text: str, whole: str) -> list[str]:
    """KEY=VALUE, …: commas within brackets and quotes are of a value."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else (character in "[{") - (character in "]}")
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    for part in parts:
        key, found, value = part.partition("=")
        if _SETTINGS.search(key + found):
            raise ConfigError(
                f"contender {whole!r}: {json.dumps(part)} is another contender: put a space before "
                f"it instead of the comma"
            )
        if not (key.strip() and found and value.strip()):
            raise ConfigError(
                f"contender {whole!r}: expected key=value after @ and each comma, found "
                f"{json.dumps(part)}"
            )
    return parts
