"""The sequences that a run will train on and evaluate: their lengths, and the batches they make."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from corolla import seeds
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoder
from corolla.data.federated import FederatedData
from corolla.data.rows import Example
from corolla.estimates.footprint import Batch
from corolla.server.rounds.federation import Federation

_SCORED = 8
"""Sequences that are evaluated at a time."""
_TASKS = 256
"""Number of tasks of a long run that are looked at for the batches that clients draw."""
_ROWS = 20_000
"""Number of rows of clients after which no further client is looked at: a millisecond each."""
_CHARACTERS = 3
"""Characters of a token where no tokenizer can be asked: few enough that hardly a text has more."""


@dataclass(frozen=True)
class Batches:
    """The batches of sequences that decide what a run costs."""

    largest: Batch
    """The most of everything that a client trains on at a time."""
    typical: Batch
    """A step's mean numbers of positions and targets, as one batch."""
    evaluated: Batch
    """The largest that is evaluated at a time."""


def batches(federation: Federation, data: FederatedData, lengths: "Lengths") -> Batches:
    """The batches of a run's first tasks and of its evaluation."""
    config = federation.config
    drawn = _drawn(federation, data, lengths)
    scored = sorted(lengths(federated.spread(data.heldout, config.eval_examples)))
    return Batches(_largest(drawn), _typical(drawn, config), _padded(scored[-_SCORED:]))


Lengths = Callable[[Sequence[Example]], list[tuple[int, int]]]
"""Examples → (tokens, targets) of their sequences."""


def exact(encoder: Encoder, once: bool) -> Lengths:
    """The lengths of the sequences that a run makes; `once`: of each row the first alone."""

    def of(examples: Sequence[Example]) -> list[tuple[int, int]]:
        found = [encoder(row)[: 1 if once else None] for row in examples]
        return [(len(own.input_ids), own.targets) for sequences in found for own in sequences]

    return of


def estimated(config: RunConfig, labels: int) -> Lengths:
    """The lengths of sequences where no tokenizer can be asked."""
    most = config.max_length

    def of(examples: Sequence[Example]) -> list[tuple[int, int]]:
        pairs = []
        for row in examples:
            asked, told = (math.ceil(len(text) / _CHARACTERS) for text in _parts(row))
            whole = asked + told + 1
            if labels:
                pairs.append((min(most, whole), 1))
            elif row.dialogue:
                pairs.append((min(most, whole), max(1, min(most, whole) - asked)))
            else:  # windows with one token of overlap
                sizes = [min(most, whole - start) for start in range(0, whole - 1, most - 1)]
                pairs += [(size, size - 1) for size in sizes]
        return pairs

    return of


def _parts(row: Example) -> tuple[str, str]:
    """(what is context in a row, what is learnt), as text."""
    if not row.dialogue:
        return "", row.text
    context = [turn.content + turn.more for turn in row.dialogue if not turn.learnt]
    return "\n".join(context), "\n".join(turn.content for turn in row.dialogue if turn.learnt)


def _drawn(federation: Federation, data: FederatedData, lengths: Lengths) -> list[Batch]:
    """The micro-batches that a run will draw in its first tasks, of clients with _ROWS rows."""
    tasks = [
        (round, client)
        for round in range(1, min(federation.config.rounds, _TASKS) + 1)
        for client in federation.sample(list(federation.clients), federation.cohort_size, round)
    ][:_TASKS]
    of_client: dict[str, list[tuple[int, int]]] = {}
    micro, rows = list[Batch](), 0
    for round, client in tasks:
        if client not in of_client:
            if rows >= _ROWS:
                continue
            rows += len(data.clients[client].train)
            # With dp=example a client may have no sequence, and trains on one without targets.
            of_client[client] = lengths(data.clients[client].train) or [(1, 0)]
        config = federation.config.of_class(federation.class_of(client))
        seed = seeds.derive(federation.config.seed, "client", client, round)
        size = config.micro_batch_size or config.batch_size
        for indices in schedule.batches(config, len(of_client[client]), seed):
            own = [of_client[client][i] for i in indices]
            micro += [_padded(own[at : at + size]) for at in range(0, len(own), size)]
    return micro


def _padded(rows: Sequence[tuple[int, int]]) -> Batch:
    return Batch(len(rows), max(length for length, _ in rows), sum(n for _, n in rows))


def _largest(batches: Sequence[Batch]) -> Batch:
    """The most of everything."""
    return Batch(
        max(batch.sequences for batch in batches),
        max(batch.tokens for batch in batches),
        max(batch.targets for batch in batches),
    )


def _typical(batches: Sequence[Batch], config: RunConfig) -> Batch:
    """A step's mean numbers of positions and targets, as one batch."""
    size = config.batch_size
    share = size / statistics.fmean(batch.sequences for batch in batches)
    positions = share * statistics.fmean(batch.positions for batch in batches)
    targets = share * statistics.fmean(batch.targets for batch in batches)
    return Batch(size, math.ceil(positions / size), math.ceil(targets))
