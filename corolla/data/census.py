"""How long rows are in tokens, what max_length leaves of them, and who has nothing left."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoder
from corolla.data.federated import FederatedData
from corolla.data.rows import Example
from corolla.errors import DataError

SAMPLE = 2000
"""Rows that are looked at when a run begins."""

_WHOLE = 1 << 30
"""Tokens that no row has."""


@dataclass
class Census:
    """The lengths of rows, in tokens of their whole text, and what of them is learnt from."""

    encoder: Encoder
    once: bool = False
    """True where only the first sequence of a row is learnt from."""
    tokens: list[int] = field(default_factory=list)
    """The length of each row: that of its longest sequence, were nothing cut; 0 without any."""
    split: int = 0
    """Rows of text that become several sequences, with nothing lost."""
    cut: int = 0
    """Rows that lose a part of what is to be learnt."""
    dropped: int = 0
    """Rows of which nothing is left within max_length."""
    blank: int = 0
    """Rows that have nothing to be learnt at any length."""
    targets: int = 0
    """Tokens, or labels, that are learnt."""
    lost: int = 0
    """Tokens that would be learnt from whole rows, and are not."""
    without: Counter[str] = field(default_factory=Counter)
    """Client → its rows that are dropped or blank."""

    def __post_init__(self) -> None:
        self.max_length = self.encoder.max_length
        self._whole = replace(self.encoder, max_length=_WHOLE)

    def add(self, row: Example, client: str = "") -> None:
        """Counts a row."""
        whole = self._whole(row)
        size = max((len(own.input_ids) for own in whole), default=0)
        wanted = kept = sum(own.targets for own in whole)
        if size > self.max_length or (self.once and len(whole) > 1):
            own = self.encoder(row)[: 1 if self.once else None]
            kept = sum(sequence.targets for sequence in own)
            self.split += kept == wanted and len(own) > len(whole)
            self.cut += 0 < kept < wanted or (kept == wanted and len(own) == len(whole))
            self.dropped += kept == 0 < wanted
        self.blank += wanted == 0
        self.without[client] += kept == 0
        self.tokens.append(size)
        self.targets += kept
        self.lost += wanted - kept

    def quantile(self, part: float) -> int:
        """The least number of tokens that this part of the rows does not exceed."""
        ordered = sorted(self.tokens)
        return ordered[min(len(ordered) - 1, max(0, -int(-part * len(ordered) // 1) - 1))]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        marks = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}
        return {
            "max_length": self.max_length,
            "rows": len(self.tokens),
            "tokens": {name: self.quantile(part) for name, part in marks.items()},
            "longer": sum(size > self.max_length for size in self.tokens),
            "split": self.split,
            "cut": self.cut,
            "dropped": self.dropped,
            "blank": self.blank,
            "targets": self.targets,
            "targets_lost": self.lost,
            "without_target": {client: n for client, n in sorted(self.without.items()) if n},
        }


def sample(data: FederatedData, encoder: Encoder, seed: int, most: int = SAMPLE) -> dict[str, Any]:
    """Lengths of at most `most` training rows, drawn by the seed; `of` says of how many."""
    census, before = Census(encoder), 0
    count = sum(len(split.train) for split in data.clients.values())
    places = deque(drawn(count, most, seed))
    for client, split in data.clients.items():
        while places and places[0] < before + len(split.train):
            census.add(split.train[places.popleft() - before], client)
        before += len(split.train)
    return {"of": count, **census.to_json()}


def drawn(count: int, most: int, seed: int) -> Iterable[int]:
    """Places of at most `most` of `count` rows, in order."""
    if count <= most:
        return range(count)
    order = torch.randperm(count, generator=seeds.generator(seed, "lengths"))
    return sorted(order[:most].tolist())


def with_targets(
    config: RunConfig, data: FederatedData, tokenizer: PreTrainedTokenizerBase
) -> FederatedData:
    """The clients of which any row has a target; the others are left out, and said to be.

    Of most clients one row is looked at. With dp=example all stay: what becomes of a client must
    not follow from its rows. Raises DataError where nobody is left.
    """
    if config.dp == "example":
        return data
    labels = data.labels if config.task != "causal" else ()
    encoder = Encoder.of(config, tokenizer, labels)
    clients = {
        client: split
        for client, split in data.clients.items()
        if any(encoder(row) for row in split.train)
    }
    if not clients:
        raise DataError(
            f"no row of {data.name} has a target left within max_length={config.max_length}: "
            f"raise it"
        )
    without = tuple(client for client in data.clients if client not in clients)
    return replace(data, clients=clients, without=without) if without else data


def told(found: Mapping[str, Any]) -> str:
    """The lengths of a sample in a line."""
    rows, of, tokens, most = found["rows"], found["of"], found["tokens"], found["max_length"]
    whose = f"all {of} training rows" if rows == of else f"{rows} of {of} training rows, a sample"
    line = (
        f"{whose}: {tokens['least']} to {tokens['most']} tokens, half have at most "
        f"{tokens['median']}"
    )
    parts = [
        f"{found[name]} {what}"
        for name, what in (
            ("split", "become several sequences"),
            ("cut", f"are cut at max-length={most}"),
            ("dropped", f"have no target within max-length={most}"),
            ("blank", "have no target"),
        )
        if found[name]
    ]
    without: Sequence[tuple[str, int]] = sorted(
        found["without_target"].items(), key=lambda item: (-item[1], item[0])
    )
    if without:
        named = ", ".join(f"{client} ({n})" for client, n in without[:5])
        parts.append(f"without a target by client: {named}{', …' if len(without) > 5 else ''}")
    return "; ".join([line, *parts])
