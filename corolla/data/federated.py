"""Data sets by name or path, their clients, and their splits. Text only; tokens come later.

A row has `text`, or `prompt` and `response` (also called `question`, with `context`, and `answer`),
or `prompt`, `choices` and `answer` (the index of the right one), or `text` and `label`, or one of
the conversations of corolla.data.forms; optionally `client_id`
(the natural partition; in all rows, or in none), `split` (train, validation, test) and, in all rows
or in none again, `user_id`: with dp=example all rows of a user at a client are protected as one.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from corolla.config.run import RunConfig
from corolla.data import kept
from corolla.data.files import columns
from corolla.data.files.sources import Source
from corolla.data.partition import Split, partition, split_client
from corolla.data.rows import (
    Example,
    Rows,
    check_clients,
    check_one_kind,
    check_users,
    counted,
    read,
    unit_of,
)
from corolla.errors import DataError
from corolla.host import logs

_log = logs.logger("data")


@dataclass(frozen=True)
class FederatedData:
    """Clients by id (sorted), a held-out set that no client trains on, and labels if any."""

    name: str
    clients: Mapping[str, Split]
    heldout: Sequence[Example]
    labels: Sequence[str]
    fingerprint: str
    validation_reported: bool = False
    """True where clients' own validation examples are the held-out set, for want of other rows."""
    left_out: int = 0
    """Clients with fewer than min_examples training examples."""
    without: tuple[str, ...] = ()
    """Clients that are left out because none of their rows has a target within max_length."""
    container: str = ""
    """In words, what was read."""
    notes: Sequence[tuple[str, str]] = ()
    """Notes on the data, each with what to do about it: both in words."""
    unused: frozenset[str] = frozenset()
    """Columns that change the meaning of a row and were not used."""

    @property
    def names_users(self) -> bool:
        """True where the training rows of any client name users."""
        return any(unit_of(split.train) == "user" for split in self.clients.values())


def load(config: RunConfig) -> FederatedData:
    """The federation of a run: rows, partition, splits; the same on every machine.

    Raises DataError for a file that is missing, malformed or leaves no client, ConfigError for a
    partition that the data cannot give.
    """
    return dealt(config, kept.read(source_of(config)))


def dealt(config: RunConfig, found: Rows) -> FederatedData:
    """The federation that `load` makes of rows which are read. Raises as `load` does."""
    rows = found.examples
    check_one_kind(rows, config.data)
    if config.dp == "example":
        check_users(rows, config.data)
    labels, notes = _labels(rows, config)
    given = frozenset(row.split for row in rows if row.split not in (None, "train"))
    parts = partition(rows, given, config)
    clients: dict[str, Split] = {}
    heldout: list[Example] = []
    for client in sorted(parts):
        split, held = split_client(parts[client], given, config, client)
        heldout += held
        if counted(config.dp, split.train) >= config.min_examples:
            clients[client] = split
    if not clients:
        raise DataError(
            f"no clients left of {len(parts)} in {config.data}: none has min_examples="
            f"{config.min_examples} training examples; lower it or the number of clients"
        )
    own = not heldout
    heldout = heldout or [row for split in clients.values() for row in split.eval]
    if config.pooled:
        clients = _pooled(clients)
    if not heldout:
        raise DataError(f"{config.data} leaves no held-out examples: raise eval_fraction")
    left_out = len(parts) - len(clients)
    return FederatedData(
        config.data,
        clients,
        heldout,
        labels,
        found.fingerprint,
        validation_reported=own,
        left_out=left_out,
        container=found.reading.told(),
        notes=notes,
        unused=frozenset(found.unused),
    )


def source_of(config: RunConfig) -> Source:
    """Returns the source from which a run reads its rows."""
    return Source(config.data, config.columns, config.splits, config.subset)


def _pooled(clients: Mapping[str, Split]) -> dict[str, Split]:
    """One client with the rows of all, in the order of ids; one that is alone stays as it is.

    Its own examples are taken in turn from each, so that the first ones are of as many as can be.
    """
    if len(clients) < 2:
        return dict(clients)
    train = [row for split in clients.values() for row in split.train]
    turns = itertools.zip_longest(*(split.eval for split in clients.values()))
    return {"all": Split(train, [row for turn in turns for row in turn if row is not None])}


def load_device(
    config: RunConfig, name: str, labels: Sequence[str], limited: bool = False
) -> FederatedData:
    """The data of one device: all rows of config.data belong to the client `name`.

    They are split as a simulation splits that client, so that a device with its rows trains on the
    same sequences; of embedded data it has the rows of the client of that name. `labels` are those
    of the run; empty: it trains on text. Raises DataError, which never tells what is in a row.

    With dp=example, or where the owner has `limited` what examples may cost, what is made of a row
    depends on that row alone: all are trained on but those that say themselves that they are for
    validation or test, nothing is carved, and one whose label the run does not know is an example
    without a target. A refusal would tell whoever chooses `labels` what a single row has.
    """
    found = read(source_of(config))
    rows, fingerprint = found.examples, found.fingerprint
    check_one_kind(rows, config.data)
    check_clients(rows, config.data)
    if config.dp == "example":
        check_users(rows, config.data)
    if config.data == "embedded":
        names = sorted({str(row.client) for row in rows})
        rows = [row for row in rows if row.client == name]
        if not rows:
            raise DataError(f"embedded data has no client {name!r}: it has {', '.join(names)}")
    if unused := found.unused:
        _log.warning("columns that change the meaning are not used", columns=sorted(unused))
    unknown = sum(row.label not in labels for row in rows) if labels else 0
    if limited or config.dp == "example":
        if unknown:
            _log.warning("rows without a label of the run", rows=unknown, of=len(rows))
            rows = [row if row.label in labels else replace(row, label=None) for row in rows]
        split = Split([row for row in rows if row.split in (None, "train")], ())
    elif unknown:
        raise DataError(f"{unknown} of {len(rows)} rows have no label of this run's {len(labels)}")
    else:
        given = frozenset(row.split for row in rows if row.split not in (None, "train"))
        split, _ = split_client(rows, given, config, name)
    left = counted("example" if limited else config.dp, split.train)
    if left < config.min_examples:  # who asks learns of it: of users, how many, not of their rows
        of = f"{left} of {len(rows)} rows" if left == len(split.train) else f"{left} users"
        raise DataError(
            f"{of} are left to train on, the run asks for min_examples={config.min_examples}"
        )
    return FederatedData(config.data, {name: split}, (), list(labels), fingerprint)


def load_heldout(config: RunConfig) -> FederatedData:
    """Returns the data on which a server that has no clients' data measures.

    There are no clients, but held-out rows and labels. Embedded data: what a simulation holds out.
    A file: its test rows, else its validation rows; without splits, what a simulation holds out
    where rows have client_id, else all rows.
    """
    found = kept.read(source_of(config))
    rows = found.examples
    check_one_kind(rows, config.data)
    check_clients(rows, config.data)
    by_split = {name: [row for row in rows if row.split == name] for name in ("test", "validation")}
    heldout: Sequence[Example] = by_split["test"] or by_split["validation"]
    if not heldout and all(row.client is not None for row in rows):
        heldout = load(config).heldout
    labels, notes = _labels(rows, config)
    return FederatedData(
        config.data,
        {},
        heldout or rows,
        labels,
        found.fingerprint,
        container=found.reading.told(),
        notes=notes,
        unused=frozenset(found.unused),
    )


def _labels(rows: Sequence[Example], config: RunConfig) -> tuple[list[str], list[tuple[str, str]]]:
    """The labels of a run, and what is to be said of them."""
    if config.task == "causal":
        return [], []
    labels, told = columns.labels([row.label for row in rows], config.data)
    return labels, [(told, "see what stands in label, or --set task=causal")] if told else []


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` examples at even distances, so that every client has its share."""
    if len(examples) <= most:
        return list(examples)
    return [examples[(2 * i + 1) * len(examples) // (2 * most)] for i in range(most)]
