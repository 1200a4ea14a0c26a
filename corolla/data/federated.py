"""Data sets by name or path, their clients, and their splits. Text only; tokens come later.

A row has `text`, or `prompt` and `response` (also called `question` and `answer`), or `prompt`,
`choices` and `answer` (the index of the right one), or `text` and `label`; optionally `client_id`
(the natural partition) and `split` (train, validation, test).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.errors import ConfigError, DataError
from corolla.host import logs

_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"eval": "validation", "dev": "validation", "test": "test"}

_log = logs.logger("data")


@dataclass(frozen=True)
class Example:
    """One row. Exactly one of: text; prompt and text (the response); text and label.

    With `choices`, the response is the right one of them.
    """

    text: str
    prompt: str | None = None
    label: str | None = None
    client: str | None = None
    split: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """One client's examples."""

    train: Sequence[Example]
    eval: Sequence[Example]


@dataclass(frozen=True)
class FederatedData:
    """Clients by id (sorted), a held-out set that no client trains on, and labels if any."""

    name: str
    clients: Mapping[str, Split]
    heldout: Sequence[Example]
    labels: Sequence[str]
    fingerprint: str
    left_out: int = 0
    """Clients with fewer than min_examples training examples."""


def load(config: RunConfig) -> FederatedData:
    """The federation of a run: rows, partition, splits; the same on every machine.

    Raises DataError for a file that is missing, malformed or leaves no client, ConfigError for a
    partition that the data cannot give.
    """
    rows, fingerprint = read(config.data)
    _one_kind(rows, config.data)
    labels = _labels(rows, config)
    given = frozenset(row.split for row in rows if row.split not in (None, "train"))
    parts = _partition(rows, given, config)
    clients: dict[str, Split] = {}
    heldout: list[Example] = []
    for client in sorted(parts):
        split, held = _split(parts[client], given, config, client)
        heldout += held
        if len(split.train) >= config.min_examples:
            clients[client] = split
    if not clients:
        raise DataError(
            f"no clients left of {len(parts)} in {config.data}: none has min_examples="
            f"{config.min_examples} training examples; lower it or the number of clients"
        )
    heldout = heldout or [row for split in clients.values() for row in split.eval]
    if not heldout:
        raise DataError(f"{config.data} leaves no held-out examples: raise eval_fraction")
    left_out = len(parts) - len(clients)
    return FederatedData(config.data, clients, heldout, labels, fingerprint, left_out)


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
    rows, fingerprint = read(config.data)
    _one_kind(rows, config.data)
    if config.data == "embedded":
        names = sorted({str(row.client) for row in rows})
        rows = [row for row in rows if row.client == name]
        if not rows:
            raise DataError(f"embedded data has no client {name!r}: it has {', '.join(names)}")
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
        split, _ = _split(rows, given, config, name)
    if len(split.train) < config.min_examples:
        raise DataError(
            f"{len(split.train)} of {len(rows)} rows are left to train on, the run asks for "
            f"min_examples={config.min_examples}"
        )
    return FederatedData(config.data, {name: split}, (), list(labels), fingerprint)


def load_heldout(config: RunConfig) -> FederatedData:
    """What a server that has no clients' data measures on: no clients, held-out rows, labels.

    Embedded data: what a simulation holds out. A file: its test rows, else its validation rows;
    without splits, what a simulation holds out where rows have client_id, else all rows.
    """
    rows, fingerprint = read(config.data)
    _one_kind(rows, config.data)
    by_split = {name: [row for row in rows if row.split == name] for name in ("test", "validation")}
    heldout: Sequence[Example] = by_split["test"] or by_split["validation"]
    if not heldout and all(row.client is not None for row in rows):
        heldout = load(config).heldout
    labels = _labels(rows, config)
    return FederatedData(config.data, {}, heldout or rows, labels, fingerprint)


def _labels(rows: Sequence[Example], config: RunConfig) -> list[str]:
    labels = sorted({row.label for row in rows if row.label is not None})
    return [] if config.task == "causal" else labels


def read(name: str) -> tuple[list[Example], str]:
    """The rows of a data set and the sha256 of its content: 'embedded', .jsonl file or hub name.

    Raises DataError naming the line that cannot be used.
    """
    path = asset("data.jsonl") if name == "embedded" else Path(name)
    if name == "embedded" or path.suffix in {".jsonl", ".json"} or path.exists():
        return _read_lines(path)
    rows = _read_hub(name)
    digest = hashlib.sha256(json.dumps([vars(r) for r in rows], sort_keys=True).encode())
    return rows, digest.hexdigest()


def _read_lines(path: Path) -> tuple[list[Example], str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        rows.append(_example(row, f"{path}, line {number}"))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows, hashlib.sha256(content).hexdigest()


def _read_hub(name: str) -> list[Example]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen unrelated types for a missing name
        raise DataError(
            f"data set {name!r} is neither a file here nor on the hub: {str(error).splitlines()[0]}"
        ) from error
    rows = []
    for split, table in splits.items():
        for number, row in enumerate(table):
            rows.append(_example({"split": str(split), **row}, f"{name}, {split} row {number}"))
    return rows


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    row, choices = _answered(row, where)
    if ("response" in row) != ("prompt" in row) or ("prompt" in row and "text" in row):
        raise DataError(f"{where}: needs both prompt and response, or text alone")
    text, prompt = row.get("text", row.get("response")), row.get("prompt")
    if not isinstance(text, str) or ("prompt" in row and not isinstance(prompt, str)):
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise DataError(f"{where}: needs text, or prompt and response, as strings; found {found}")
    split = row.get("split") or ""
    if split and str(split) not in _SPLITS:
        raise DataError(f"{where}: unknown split {split!r}: use train, validation or test")
    label, client = row.get("label"), row.get("client_id")
    for key, value in (("text", text), ("prompt", prompt), ("label", label), ("client_id", client)):
        if not _encodable(str(value)):
            raise DataError(f"{where}: {key} has half of a surrogate pair, which is no text")
    return Example(
        text,
        prompt,
        None if label is None else str(label),
        None if client is None else str(client),
        _SPLITS.get(split),
        choices,
    )


def _answered(row: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(a row with prompt and response where it has a question and an answer, its choices)."""
    if "text" in row or "response" in row or "answer" not in row:
        return row, ()
    if "prompt" not in row and "question" in row:
        row = {**row, "prompt": row["question"]}
    if "prompt" not in row:
        return row, ()
    answer, choices = row["answer"], row.get("choices")
    if choices is None:
        return {**row, "response": answer}, ()
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: choices must be a list of at least two strings")
    for choice in choices:
        if not isinstance(choice, str) or not choice or not _encodable(choice):
            raise DataError(f"{where}: choices must be strings that are not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be the index of a choice, 0 to {len(choices) - 1}, "
            f"found {answer!r}"
        )
    return {**row, "response": choices[answer]}, tuple(choices)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_kind(rows: Sequence[Example], name: str) -> None:
    labelled = sum(row.label is not None for row in rows)
    if labelled not in (0, len(rows)):
        raise DataError(f"{name}: {labelled} of {len(rows)} rows have a label; all or none must")
    if labelled and any(row.prompt is not None for row in rows):
        raise DataError(f"{name}: rows have prompt, response and label; use text and label")
    chosen = sum(bool(row.choices) for row in rows)
    if chosen not in (0, len(rows)):
        raise DataError(f"{name}: {chosen} of {len(rows)} rows have choices; all or none must")


def _partition(
    rows: Sequence[Example], given: frozenset[str | None], config: RunConfig
) -> dict[str, list[Example]]:
    natural = all(row.client is not None for row in rows)
    kind = config.partition
    if kind == "auto":
        kind = "natural" if natural else "iid"
    if kind == "natural":
        if not natural:
            raise DataError(f"{config.data}: partition natural needs client_id in every row")
        return _natural(rows, given, config)
    return _artificial(rows, kind, config)


def _natural(
    rows: Sequence[Example], given: frozenset[str | None], config: RunConfig
) -> dict[str, list[Example]]:
    parts: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        parts[str(row.client)].append(row)
    if config.clients is None:
        return parts
    big_enough = sorted(
        c
        for c, own in parts.items()
        if len(_split(own, given, config, c)[0].train) >= config.min_examples
    )
    if config.clients > len(big_enough):
        raise ConfigError(
            f"asked for {config.clients} clients, {config.data} has {len(big_enough)} with "
            f"enough examples: lower --clients, or use --set partition=iid"
        )
    order = torch.randperm(len(big_enough), generator=seeds.generator(config.seed, "clients"))
    return {big_enough[i]: parts[big_enough[i]] for i in order[: config.clients].tolist()}


def _artificial(rows: Sequence[Example], kind: str, config: RunConfig) -> dict[str, list[Example]]:
    """Partitions of flwr-datasets over the training rows; other rows go round-robin."""
    import datasets
    from flwr_datasets import partitioner as flower

    train = [row for row in rows if row.split in (None, "train")]
    number = config.clients or 10
    if number * config.min_examples > len(train):
        raise ConfigError(
            f"asked for {number} clients, {config.data} has {len(train)} training rows: fewer "
            f"than min_examples={config.min_examples} for each; lower --clients"
        )
    labels = [row.label or "" for row in train]
    if kind in ("dirichlet", "shards") and not any(labels):
        raise ConfigError(f"partition {kind} needs labels, {config.data} has none: use iid")
    seed = seeds.derive(config.seed, "partition")
    table = datasets.Dataset.from_dict({"row": list(range(len(train))), "label": labels})
    if kind == "dirichlet":
        dealer: Any = flower.DirichletPartitioner(
            num_partitions=number,
            partition_by="label",
            alpha=config.partition_alpha,
            min_partition_size=config.min_examples,
            seed=seed,
        )
    elif kind == "shards":
        dealer = flower.ShardPartitioner(
            num_partitions=number,
            partition_by="label",
            num_shards_per_partition=config.shards_per_client,
            seed=seed,
        )
    else:
        table = table.shuffle(seed=seed)
        by_size = {
            "iid": flower.IidPartitioner,
            "linear": flower.LinearPartitioner,
            "square": flower.SquarePartitioner,
            "exponential": flower.ExponentialPartitioner,
        }
        dealer = by_size[kind](num_partitions=number)
    dealer.dataset = table
    width = len(str(number - 1))
    try:
        parts = {
            f"client-{i:0{width}d}": [train[row] for row in dealer.load_partition(i)["row"]]
            for i in range(number)
        }
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(f"partition {kind} into {number} clients failed: {error}") from error
    names = list(parts)
    for i, row in enumerate(row for row in rows if row.split not in (None, "train")):
        parts[names[i % number]].append(row)
    return parts


def _split(
    rows: Sequence[Example], given: frozenset[str | None], config: RunConfig, client: str
) -> tuple[Split, Sequence[Example]]:
    """(train and eval of one client, its share of the global held-out set).

    `given` are the splits that the data set has beside train: they are honoured (validation is the
    client's own, test is global), and what it has is not cut a second time. The rest is carved.
    """
    order = torch.randperm(len(rows), generator=seeds.generator(config.seed, "split", client))
    shuffled = [rows[i] for i in order.tolist()]
    own = [row for row in shuffled if row.split == "validation"]
    held = [row for row in shuffled if row.split == "test"]
    train = [row for row in shuffled if row.split in (None, "train")]
    carve = max(1, round(len(train) * config.eval_fraction))
    if not given and len(train) > 2:
        held, train = train[:carve], train[carve:]
    if "validation" not in given and len(train) > 2:
        own, train = train[:carve], train[carve:]
    return Split(train, own), held


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` examples at even distances, so that every client has its share."""
    if len(examples) <= most:
        return list(examples)
    return [examples[(2 * i + 1) * len(examples) // (2 * most)] for i in range(most)]
