"""Files of --keep-updates: each client's adapter, to check aggregation with peft alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from corolla.artefacts.card import write_brief_card
from corolla.models.trainable import Trainable
from corolla.storage.folders import client_folder
from corolla.types import Adapter, LoraSpec, Payload, Update
from corolla.wire import codec

_TRAINED = ("adapter", "factors", "head")
"""Groups of updates that hold what was trained: differences, or factors with their scaling."""


def write_update(
    folder: Path, model: Trainable, lora: LoraSpec, update: Update, client: str
) -> None:
    """The adapter a client's model holds after local training, read from the model itself.

    It is relative to the base model: with frozen blocks it is stacked with them. The server adds
    the weight in the mean to `update.json` when the round is done.
    """
    model.save(folder, Adapter(model.read(), model.frozen), lora)
    write_brief_card(
        folder, "What the model of one client held after one round, not a result.", model.base.name
    )
    facts = {
        "client": client,
        "num_examples": update.num_examples,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "metrics": dict(update.metrics),
    }
    (folder / "update.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_decoded(
    folder: Path, model: Trainable, lora: LoraSpec, sent: Payload, opened: Payload
) -> None:
    """Writes, beside the adapter, an update as the server decodes it after a lossy codec.

    `sent` is what was encoded. `decoded.safetensors` has the tensors as they travel, GROUP/NAME.
    Where all of them are of the model, `decoded/` is the adapter that they stand for: what was
    trained, with what the codec has changed of it.
    """
    tensors = {f"{group}/{name}": t for group, own in opened.items() for name, t in own.items()}
    codec.write(str(folder / "decoded.safetensors"), tensors, {"format": "pt"})
    trained = dict(model.read())
    for group, own in opened.items():
        for name, tensor in own.items():
            if group not in _TRAINED or name not in trained or trained[name].shape != tensor.shape:
                return
            lost = tensor - sent[group][name]
            scale = _scale(sent[group][name], trained[name]) if group == "factors" else 1.0
            trained[name] = trained[name] + lost / scale
    model.save(folder / "decoded", Adapter(trained, model.frozen), lora)
    write_brief_card(
        folder / "decoded", "One client's update as the server decoded it.", model.base.name
    )


def _scale(sent: Tensor, trained: Tensor) -> float:
    """Computes the number that a factor was multiplied by to be sent; 1.0 for a factor of zeros.

    Each strategy divides the scaling its own way.
    """
    square = float(trained.double().square().sum())
    return float((sent.double() * trained.double()).sum()) / square if square else 1.0


def write_weights(folder: Path, num_examples: Mapping[str, int]) -> None:
    """Add each accepted client's weight p_m = n_m / Σ n to the `update.json` files of a round.

    n_m are the distinct examples that it trained on in this round.
    """
    total = sum(num_examples.values())
    for client, examples in num_examples.items():
        path = client_folder(folder, client) / "update.json"
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "weight": examples / total}, indent=2) + "\n")
