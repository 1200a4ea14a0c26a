"""Files of --keep-updates: each client's adapter, to check aggregation with peft alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.storage.folders import client_folder
from corolla.types import Adapter, LoraSpec, Update

if TYPE_CHECKING:  # it loads transformers, which a gateway has no use for
    from corolla.models.trainable import Trainable


def write_update(
    folder: Path, model: "Trainable", lora: LoraSpec, update: Update, client: str
) -> None:
    """The adapter a client's model holds after local training, read from the model itself.

    It is relative to the base model: with frozen blocks it is stacked with them. The server adds
    the weight in the mean to `update.json` when the round is done.
    """
    model.save(folder, Adapter(model.read(), model.frozen), lora)
    facts = {
        "client": client,
        "num_examples": update.num_examples,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "metrics": dict(update.metrics),
    }
    (folder / "update.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_weights(folder: Path, num_examples: Mapping[str, int]) -> None:
    """Add each accepted client's weight p_m = n_m / Σ n to the `update.json` files of a round."""
    total = sum(num_examples.values())
    for client, examples in num_examples.items():
        path = client_folder(folder, client) / "update.json"
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "weight": examples / total}, indent=2) + "\n")
