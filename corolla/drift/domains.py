"""Domains: files of rows on which a model before and after tuning is compared.

A row has `choices` and `answer` (a refusal and a compliance, or right and wrong answers), or a
prompt and a response, or text. Three domains ship with Corolla: corolla/embedded/DRIFT_CARD.md.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corolla.data.files.sources import Reading, Source
from corolla.data.rows import Example, check_one_kind, examples
from corolla.embedded.assets import asset
from corolla.errors import ConfigError, DataError

SHIPPED = {
    "refusals": "drift_refusals.jsonl",
    "knowledge": "drift_knowledge.jsonl",
    "texts": "drift_texts.jsonl",
}
"""Name of a domain that ships with Corolla → its file."""


@dataclass(frozen=True)
class Domain:
    """The rows of one domain."""

    name: str
    rows: Sequence[Example]

    @property
    def choices(self) -> bool:
        """True where each row has choices, so that margins can be told."""
        return bool(self.rows[0].choices)


def read(asked: Sequence[str]) -> list[Domain]:
    """The domains of FILE, NAME=FILE and names in SHIPPED; `all` are those that ship.

    Raises ConfigError for two of one name, DataError for a file that is missing, has no rows, or
    rows that cannot be measured.
    """
    found: dict[str, Domain] = {}
    for name, path in (pair for own in asked for pair in _named(own)):
        if name in found:
            raise ConfigError(f"drift has two domains {name}: name them apart, with NAME=FILE")
        found[name] = Domain(name, _rows(path))
    return list(found.values())


def _named(asked: str) -> list[tuple[str, Path]]:
    if asked == "all":
        return [(name, asset(file)) for name, file in SHIPPED.items()]
    if asked in SHIPPED:
        return [(asked, asset(SHIPPED[asked]))]
    name, mark, file = asked.partition("=")
    path = Path(file if mark else asked)
    if not path.is_file():
        raise DataError(
            f"drift={asked}: no such file; {', '.join(SHIPPED)} and all ship with Corolla, else "
            f"give FILE or NAME=FILE"
        )
    return [(name if mark else path.name.partition(".")[0], path)]


def _rows(path: Path) -> list[Example]:
    rows = list(examples(Source(str(path)), Reading(), Counter()))
    if not rows:
        raise DataError(f"{path} has no rows to measure drift on")
    check_one_kind(rows, str(path))
    if rows[0].label is not None:
        raise DataError(
            f"{path} has labels: drift is measured on choices, on prompts with responses or on text"
        )
    return rows
