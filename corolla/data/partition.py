"""How rows become clients: by their client_id, or drawn to differ as much as is asked."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.data.rows import Example, check_clients
from corolla.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """One client's examples."""

    train: Sequence[Example]
    eval: Sequence[Example]


def partition(
    rows: Sequence[Example], given: frozenset[str | None], config: RunConfig
) -> dict[str, list[Example]]:
    """Rows by client, as the run asks. Raises ConfigError or DataError where that cannot be."""
    kind = config.partition
    if kind in ("auto", "natural"):
        check_clients(rows, config.data, ", or --set partition=iid deals all rows out at random")
    natural = all(row.client is not None for row in rows)
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
        if len(split_client(own, given, config, c)[0].train) >= config.min_examples
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


def split_client(
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
