"""Buffered asynchronous aggregation: clients at work, and replies on their way.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), AISTATS 2022,
arXiv 2106.06639: `cohort` clients (their concurrency M_c) are always at work, the server takes a
step for every `buffer` updates (their K), and an update made from an older state counts less than
newer ones of the same step: weights are divided by their sum, where the paper divides by K, so that
updates that are all equally late count in full.
Here a client that has answered is replaced when the server has stepped, not at once: with
buffer = cohort and equal speeds this is synchronous training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corolla.types import Payload
from corolla.wire.packet import Packet

FLIGHTS = "flights"
"""The group of a server's memory that holds them."""


@dataclass(frozen=True)
class Flight:
    """A client at work and what it will answer: None for no answer.

    `round` and `base_version` are those of its task, `content` what it holds with it (content
    ids), `arrival` is in simulated seconds since the run began.
    """

    client: str
    round: int
    base_version: str
    content: frozenset[str]
    arrival: float
    packet: Packet | None


def weight(examples: int, staleness: int, power: float) -> float:
    """It is examples · (1 + staleness)^-power; staleness counts steps of the server in between."""
    return float(examples * (1 + staleness) ** -power)


def remember(now: float, flights: Sequence[Flight]) -> Payload:
    """Returns the group of a checkpoint with the simulated time and the replies on their way."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for number, flight in enumerate(flights):
        if flight.packet is not None:
            tensors[f"{number}.header"] = _tensor(flight.packet.header)
            tensors[f"{number}.payload"] = _tensor(flight.packet.payload)
        facts = {**vars(flight), "content": sorted(flight.content)}
        notes.append({name: fact for name, fact in facts.items() if name != "packet"})
    note = json.dumps({"now": now, "flights": notes})
    return {FLIGHTS: {"note": _tensor(note.encode()), **tensors}}


def recall(memory: Payload) -> tuple[float, list[Flight]]:
    """(simulated time, replies on their way) of a server's memory; (0, []) before a first round."""
    if FLIGHTS not in memory:
        return 0.0, []
    tensors = memory[FLIGHTS]
    note = json.loads(_bytes(tensors["note"]))
    flights = []
    for number, facts in enumerate(note["flights"]):
        packet = None
        if f"{number}.header" in tensors:
            parts = (tensors[f"{number}.{part}"] for part in ("header", "payload"))
            packet = Packet(*map(_bytes, parts))
        content = frozenset(facts.pop("content"))
        flights.append(Flight(**facts, content=content, packet=packet))
    return note["now"], flights


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
