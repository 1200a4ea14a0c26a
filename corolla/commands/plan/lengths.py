"""The sequences that a run will train on and evaluate: their lengths, and the batches they make."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from corolla import seeds
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.federated import FederatedData
from corolla.data.rows import Example
from corolla.estimates.footprint import Batch
from corolla.models.anatomy import Anatomy
from corolla.server.rounds.federation import Federation

_SCORED = 8
"""Sequences that are evaluated at a time."""
_TASKS = 256
"""Number of tasks of a long run that are looked at for the batches that clients draw."""
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


def batches(federation: Federation, model: Anatomy, data: FederatedData, labels: int) -> Batches:
    """The batches of a run's first tasks and of its evaluation."""
    config = federation.config
    lengths = Lengths(model, config, labels)
    drawn = _drawn(federation, data, lengths)
    scored = sorted(lengths(federated.spread(data.heldout, config.eval_examples)))
    return Batches(_largest(drawn), _typical(drawn, config), _padded(scored[-_SCORED:]))


class Lengths:
    """(tokens, targets) of the sequences of examples, as encoding.Encoder makes them, nearly."""

    def __init__(self, model: Anatomy, config: RunConfig, labels: int) -> None:
        self.most, self.labels = config.max_length, labels
        self._count = _counter(model)

    def __call__(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        counts = self._count([text for row in examples for text in _parts(row)])
        pairs = []
        for row, asked, told in zip(examples, counts[::2], counts[1::2], strict=True):
            whole = asked + told + 1
            if self.labels:
                pairs.append((min(self.most, whole), 1))
            elif row.dialogue:
                pairs.append((min(self.most, whole), max(1, min(self.most, whole) - asked)))
            else:  # windows with one token of overlap
                cuts = range(0, whole - 1, self.most - 1)
                sizes = [min(self.most, whole - start) for start in cuts]
                pairs += [(size, size - 1) for size in sizes]
        return pairs


def _parts(row: Example) -> tuple[str, str]:
    """(what is context in a row, what is learnt), as text."""
    if not row.dialogue:
        return "", row.text
    context = [turn.content + turn.more for turn in row.dialogue if not turn.learnt]
    return "\n".join(context), "\n".join(turn.content for turn in row.dialogue if turn.learnt)


def _counter(model: Anatomy) -> Callable[[Sequence[str]], list[int]]:
    """Texts → how many tokens each has."""
    if model.tokenizer is None:
        return lambda texts: [math.ceil(len(text) / _CHARACTERS) for text in texts]
    tokenizer = Tokenizer.from_file(str(model.tokenizer))
    return lambda texts: [len(own.ids) for own in tokenizer.encode_batch(list(texts))]


def _drawn(federation: Federation, data: FederatedData, lengths: Lengths) -> list[Batch]:
    """The micro-batches that a run will draw in its first tasks."""
    tasks = [
        (round, client)
        for round in range(1, min(federation.config.rounds, _TASKS) + 1)
        for client in federation.sample(list(federation.clients), federation.cohort_size, round)
    ][:_TASKS]
    of_client = {client: lengths(data.clients[client].train) for _, client in tasks}
    micro = []
    for round, client in tasks:
        config = federation.config.of_class(federation.class_of(client))
        seed = seeds.derive(federation.config.seed, "client", client, round)
        size = config.micro_batch_size or config.batch_size
        for indices in schedule.batches(config, len(of_client[client]), seed):
            rows = [of_client[client][i] for i in indices]
            micro += [_padded(rows[at : at + size]) for at in range(0, len(rows), size)]
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
