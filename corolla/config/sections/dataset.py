"""How the data set is read, and how it is dealt out to clients."""

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from corolla.config.sections.section import Fraction, Positive, key, within
from corolla.config.sections.subject import Subject


def _day(text: str) -> str:
    """Returns a date as it is. Raises ValueError for what is none."""
    try:
        known = date.fromisoformat(text).isoformat() == text
    except ValueError:
        known = False
    if not known:
        raise ValueError("expected a day as YYYY-MM-DD")
    return text


class Dataset(Subject):
    """Rows of the data set and their clients."""

    task: Literal["auto", "causal", "classify"] = key(
        "auto",
        "What a model learns: to go on with a text, or to tell the label of one.",
        "causal",
        effect="classify where rows have labels, else causal",
    )
    columns: dict[str, str] = key(
        {},
        "Columns of the data that are called otherwise than here: columns.NAME=theirs names one.",
        {"prompt": "body"},
        effect="none: all are called as here",
        beside="data=rows.jsonl",
    )
    splits: dict[str, str] = key(
        {},
        "Splits of the data by their own names: splits.train=theirs, and so validation and test; "
        "rows of others are not read.",
        {"train": "train_sft"},
        effect="all: train, validation (also valid, val, eval, dev), test",
        beside="data=some/set",
    )
    subset: str | None = key(
        None,
        "The configuration of a hub's data set, where it has several.",
        "main",
        effect="the only one",
        beside="data=some/set",
    )
    new_head: bool = key(
        False,
        "Whether a classifier starts with a new head though its model has one: for other labels.",
        True,
        unsaid=True,
    )
    partition: Literal[
        "auto", "natural", "iid", "dirichlet", "shards", "linear", "square", "exponential"
    ] = key(
        "auto",
        "How rows are dealt out to clients: by client_id, at random, by labels (dirichlet, "
        "shards), or in unequal sizes (linear, square, exponential).",
        "iid",
        effect="natural where all rows have client_id, iid where none has",
    )
    partition_alpha: Annotated[float, Field(gt=0)] = key(
        0.5,
        "The concentration of the Dirichlet distribution: the lower it is, the more do the labels "
        "of clients differ.",
        0.1,
        beside="partition=dirichlet",
    )
    shards_per_client: Positive = key(
        2,
        "The number of shards, each of rows with like labels, that a client gets.",
        4,
        beside="partition=shards",
    )
    template_date: Annotated[str, AfterValidator(_day)] | None = key(
        None,
        "The day, as YYYY-MM-DD, that a chat template writes where it writes today's.",
        "2026-01-31",
        effect="the day on which the run starts, where its model's template writes one",
        unsaid=True,
    )
    pooled: bool = key(
        False,
        "Whether the training rows of all clients are dealt to one: training as if data were "
        "central. What is held out stays as it is.",
        True,
        against=("cohort=2",),
    )
    eval_fraction: Fraction = key(
        0.1,
        "The part of each client's examples that is kept for its own evaluation; as many again are "
        "held out for all.",
        0.2,
    )
    min_examples: Positive = key(
        2,
        "The number of training examples, or with dp=example of users where rows name them, below "
        "which a client is left out.",
        10,
    )
    max_length: Annotated[int, within("max_length")] = key(
        256,
        "The number of tokens that a sequence has at most: longer text becomes several sequences, "
        "a longer answer is cut; with dp=example longer text is cut, and shorter costs as much.",
        512,
    )
