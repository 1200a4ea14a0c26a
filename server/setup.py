"""What a server loads before the first round, whichever engine carries the messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corolla import data, models, trainable
from corolla.config import RunConfig
from corolla.data import FederatedData
from corolla.server.evaluate import Evaluator
from corolla.trainable import Trainable


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
    facts = {
        "run_id": run_id,
        "model_sha256": base.fingerprint,
        "data_sha256": dataset.fingerprint,
        "clients_left_out": dataset.left_out,
    }
    model = trainable.build(config, base)
    evaluator = Evaluator(config, model, dataset.heldout, dataset.labels)
    return Setup(dataset, model, evaluator, facts)
