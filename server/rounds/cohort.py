"""The cohort of a round: the clients that can be reached, and those of them that are drawn."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from corolla import seeds
from corolla.errors import DataError


def sample(
    clients: Sequence[str],
    size: int,
    seed: int,
    round: int,
    weights: Mapping[str, int] | None = None,
    draw: int = 0,
) -> list[str]:
    """`size` clients drawn without replacement, sorted; a function of seed, round and draw.

    Every client is in the cohort with probability size / len(clients). With `weights` (positive)
    each next one is drawn with probability proportional to its weight among those that are left
    (Efraimidis and Spirakis, Information Processing Letters 97, 2006): who weighs much comes more
    often, but less than proportionally, because nobody comes twice.
    """
    ordered = sorted(clients)
    generator = seeds.generator(seed, "cohort", round, *([draw] if draw else []))
    if weights is None:
        drawn = torch.randperm(len(ordered), generator=generator)
    else:
        uniform = torch.rand(len(ordered), generator=generator, dtype=torch.float64)
        weight = torch.tensor([weights[client] for client in ordered], dtype=torch.float64)
        drawn = torch.argsort(-torch.log1p(-uniform) / weight, stable=True)  # exponential clocks
    return sorted(ordered[i] for i in drawn[:size].tolist())


@dataclass(frozen=True)
class Trace:
    """When clients can be reached: the first and the last round of each span.

    A client without a span is never there.
    """

    spans: Mapping[str, Sequence[tuple[int, int]]]
    sha256: str

    def present(self, clients: Iterable[str], round: int) -> list[str]:
        """Those of `clients` that can be reached in a round, in the same order."""
        return [
            client
            for client in clients
            if any(first <= round <= last for first, last in self.spans.get(client, ()))
        ]


def read_trace(path: Path) -> Trace:
    """The trace of a .jsonl file: a line {"client_id": "ada", "from": 1, "to": 5} a span.

    Rounds count from 1, `to` is included. Raises DataError that names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read availability file {path}: {error.strerror}") from error
    spans: dict[str, list[tuple[int, int]]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            client, span = _span(line, f"{path}, line {number}")
            spans.setdefault(client, []).append(span)
    if not spans:
        raise DataError(f"{path} has no spans: nobody could be reached")
    return Trace(spans, hashlib.sha256(content).hexdigest())


def _span(line: bytes, where: str) -> tuple[str, tuple[int, int]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    keys = {"client_id", "from", "to"}
    if not isinstance(row, dict) or row.keys() != keys or not isinstance(row["client_id"], str):
        raise DataError(
            f'{where}: expected {{"client_id": "ada", "from": 1, "to": 5}}, found {row!r:.80}'
        )
    first, last = row["from"], row["to"]
    if type(first) is not int or type(last) is not int or not 1 <= first <= last:
        raise DataError(
            f"{where}: from and to are rounds, 1 <= from <= to, found {first!r} and {last!r}"
        )
    return row["client_id"], (first, last)
