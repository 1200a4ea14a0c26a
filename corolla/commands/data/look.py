"""`corolla data`: how rows are read, whose they are, and what of them a run would learn from.

Everything is counted over all rows as a simulation would deal them out; lengths too, unless a
sample of them is asked for. Nothing is trained, and of the model only the tokenizer is loaded.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from corolla.config.run import RunConfig
from corolla.data import census, federated, kept
from corolla.data.census import Census
from corolla.data.encoding import IGNORE, Encoded, Encoder
from corolla.data.federated import FederatedData
from corolla.data.files.columns import COLUMNS
from corolla.data.rows import Example, Rows
from corolla.models import pretrained

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Shows how far through so many numbers one is, and gives them on."""

_SHOWN = 64
"""Tokens of a masked or a learnt part of the example that are shown, at either end of it."""


@dataclass(frozen=True)
class Duplicates:
    """Rows of equal content, whoever has them."""

    within: int
    """Training rows that the same client has already."""
    across: int
    """Training rows that another client has too."""
    held_out: int
    """Held-out and validation rows that are also trained on."""


@dataclass(frozen=True)
class Shown:
    """One training row as a model gets it."""

    client: str
    parts: Sequence[tuple[str, bool]]
    """Texts of tokens in their order; True: they are learnt."""
    label: str | None = None


@dataclass(frozen=True)
class Look:
    """The description of a run's data that `corolla data` gives."""

    data: FederatedData
    rows: Rows
    forms: Mapping[str, int]
    """In words what rows are → their number."""
    training: Census
    drawn_of: int
    """Training rows there are, of which lengths are those of a sample or of all."""
    held_out: Census
    labels: Mapping[str, int]
    duplicates: Duplicates
    example: Shown | None
    """None where no row has a target."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        data, reading = self.data, self.rows.reading
        unknown = {n: count for n, count in reading.columns.items() if n not in COLUMNS}
        return {
            "data": data.name,
            "sha256": data.fingerprint,
            "container": reading.told(),
            "files_ignored": reading.ignored,
            "rows": len(self.rows.examples),
            "rows_of_other_splits": dict(reading.unread),
            "forms": dict(self.forms),
            "columns": dict(reading.columns),
            "columns_unknown": unknown,
            "columns_unused": dict(self.rows.unused),
            "clients": {
                client: {"train": len(split.train), "validation": len(split.eval)}
                for client, split in data.clients.items()
            },
            "clients_left_out": data.left_out,
            "clients_without_target": list(data.without),
            "held_out": len(data.heldout),
            "held_out_is_validation": data.validation_reported,
            "lengths": {"of": self.drawn_of, **self.training.to_json()},
            "lengths_held_out": self.held_out.to_json() if data.heldout else None,
            "labels": dict(self.labels),
            "duplicates": vars(self.duplicates),
            "notes": [f"{why}: {instead}" for why, instead in data.notes],
            "example": self.example and vars(self.example),
        }


def read(config: RunConfig) -> Rows:
    """The rows of a run's data. Raises DataError."""
    return kept.read(federated.source_of(config))


def look(config: RunConfig, rows: Rows, most: int | None, progress: Progress) -> Look:
    """Returns the description of a run's data, with lengths of `most` rows drawn by its seed.

    With `most` None lengths are of all rows. Raises CorollaError where a run would.
    """
    data = federated.dealt(config, rows)
    tokenizer = pretrained.load_tokenizer(config.model, added=config.new_tokens)
    data = census.with_targets(config, data, tokenizer)
    labels = data.labels if config.task != "causal" else ()
    encoder = Encoder.of(config, tokenizer, labels)
    train = [(client, row) for client, split in data.clients.items() for row in split.train]
    places = list(census.drawn(len(train), most or len(train), config.seed))
    training, held_out = Census(encoder, config.dp == "example"), Census(encoder)
    for i in progress(places, len(places)):
        training.add(train[i][1], train[i][0])
    kept = list(census.drawn(len(data.heldout), most or len(data.heldout), config.seed))
    for i in progress(kept, len(kept)):
        held_out.add(data.heldout[i])
    return Look(
        data=data,
        rows=rows,
        forms=Counter(map(form, rows.examples)),
        training=training,
        drawn_of=len(train),
        held_out=held_out,
        labels=Counter(row.label for _, row in train if row.label is not None),
        duplicates=duplicates(data),
        example=shown(train, encoder, tokenizer),
    )


def form(row: Example) -> str:
    """In words, what a row is."""
    if row.choices:
        return "prompt and choices"
    if row.label is not None:
        return "text and label"
    if row.turns:
        return "conversation"
    return "text" if row.prompt is None else "prompt and response"


def _content(row: Example) -> bytes:
    """A digest of the content of a row, whichever client has it and wherever it stands."""
    whose = {"client", "split", "line", "user", "unused"}
    told = [getattr(row, own.name) for own in fields(row) if own.name not in whose]
    return hashlib.blake2b(repr(told).encode(), digest_size=16).digest()


def duplicates(data: FederatedData) -> Duplicates:
    """Rows of equal content in a federation."""
    owner: dict[bytes, str] = {}
    shared = set[bytes]()
    within, held = 0, 0
    counts = Counter[bytes]()
    for client, split in data.clients.items():
        own = Counter(map(_content, split.train))
        within += own.total() - len(own)
        counts.update(own)
        for content in own:
            if owner.setdefault(content, client) != client:
                shared.add(content)
    own_eval = (row for split in data.clients.values() for row in split.eval)
    rest = own_eval if data.validation_reported else itertools.chain(data.heldout, own_eval)
    held = sum(_content(row) in owner for row in rest)
    return Duplicates(within, sum(counts[content] for content in shared), held)


def shown(
    train: Sequence[tuple[str, Example]], encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> Shown | None:
    """The first training row that has a target, in tokens as a model gets them."""
    for client, row in train:
        for encoded in encoder(row)[:1]:
            return Shown(client, _parts(encoded, tokenizer), row.label)
    return None


def _parts(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    ids = list(encoded.input_ids)
    learnt = [False] * len(ids)
    if not isinstance(encoded.labels, int):
        learnt = [at > 0 and label != IGNORE for at, label in enumerate(encoded.labels)]
    parts = []
    for is_target, group in itertools.groupby(range(len(ids)), key=lambda at: learnt[at]):
        own = [ids[at] for at in group]
        head, tail = own[:_SHOWN], own[_SHOWN:][-_SHOWN:]
        text = _text(tokenizer, head) + (" … " if len(own) > 2 * _SHOWN else "")
        parts.append((text + _text(tokenizer, tail) if tail else text, is_target))
    return parts


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
