"""A federation of two clients and a gateway, of which only names and numbers count."""

from typing import Any

import torch

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.server.rounds.federation import Federation
from corolla.types import LoraSpec, Params

CLIENTS = {"ann": 5, "bob": 9, "gate": 0}
SEATS = {"gate": 8}

CLASSES: dict[str, Any] = {
    "strong": {"trainer": "first_order", "local_steps": 3},
    "weak": {"trainer": "zeroth_order", "local_steps": 7},
    "weaker": {"trainer": "zeroth_order", "local_steps": 50},
}


def fresh(spec: LoraSpec) -> Params:
    return {"m.lora_A": torch.zeros(spec.rank, 3), "m.lora_B": torch.zeros(2, spec.rank)}


def federation(seats: Any = SEATS, clients: Any = CLIENTS, **changes: Any) -> Federation:
    own = {key: changes.pop(key) for key in ("roster", "trace") if key in changes}
    config = RunConfig(**{"rank": 2, "local_steps": 3, "batch_size": 2, **changes})
    strategy = build_strategy(config)
    return Federation("ab" * 16, config, strategy, clients, fresh, seats=seats, **own)
