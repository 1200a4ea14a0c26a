"""What a server loads before the first round, whichever engine carries the messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corolla import data, models, trainable
from corolla.config import RunConfig
from corolla.data import FederatedData
from corolla.full import FullModel
from corolla.server.evaluate import Evaluator
from corolla.trainable import Trainable

_UNMOVED = 0.1
_KEPT = 1 << 24


@dataclass(frozen=True)
class Setup:
    """Data, the model with its evaluator, and the facts that identify them in run.json."""

    data: FederatedData
    model: Trainable
    evaluator: Evaluator
    facts: Mapping[str, Any]


def set_up(config: RunConfig, run_id: str | None) -> Setup:
    """Load data and model. Raises CorollaError for whatever is wrong with them."""
    dataset = data.load(config)
    models.set_threads(config)
    base = models.load(config, dataset.labels)
    facts: dict[str, Any] = {
        "run_id": run_id,
        "model_sha256": base.fingerprint,
        "data_sha256": dataset.fingerprint,
        "clients_left_out": dataset.left_out,
    }
    model = trainable.build(config, base)
    facts["warnings"] = _warnings(config, model)
    evaluator = Evaluator(config, model, dataset.heldout, dataset.labels)
    return Setup(dataset, model, evaluator, facts)


def _warnings(config: RunConfig, model: Trainable) -> list[str]:
    """What a user should know before hours of training, in one line each."""
    if not isinstance(model, FullModel):
        return []
    found = []
    unmoved = model.unmoved(config.eps)
    if unmoved > _UNMOVED:
        found.append(
            f"eps={config.eps:g} leaves {unmoved:.0%} of the {config.dtype} weights as they are, "
            f"by rounding: raise eps, or use dtype=float32"
        )
    if model.kept_bytes > _KEPT:
        found.append(
            f"{model.kept_bytes / 1e6:.0f} MB of weights are in no .safetensors file of the model "
            f"and are kept in memory twice"
        )
    return found
