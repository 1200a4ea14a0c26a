"""The places that a run's sparse set has, as its keys choose them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from corolla.config.run import RunConfig
from corolla.data import public
from corolla.models.sparse import carried, places
from corolla.models.sparse_model import SparseModel
from corolla.models.trainable import Trainable
from corolla.selection import rows, weights
from corolla.types import Payload


def places_of(model: Trainable, config: RunConfig, labels: Sequence[str] = ()) -> Payload:
    """The group of places that everybody is sent; none where all parties draw them by themselves.

    Leaves the model showing its base. Raises DataError for public rows that cannot be used,
    ArtefactError or ConfigError for an adapter that cannot, ModelError for scores that are not
    finite.
    """
    if not isinstance(model, SparseModel) or config.select == "random":
        return {}
    model.write(model.init(config.lora, 0), config.lora)
    for own in model.modules.values():
        own.put()
    found = {
        name: places.top(scores.float(), model.counts[name]).cpu()
        for name, scores in _scores(model, config, labels)
    }
    return {carried.GROUP: places.packed(found, model.sizes)}


def _scores(
    model: SparseModel, config: RunConfig, labels: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(module, scores in the form of its weight) of all modules."""
    if config.select == "magnitude":
        return weights.magnitude(model)
    if config.select == "principal":
        return weights.principal(model, config.spectrum)
    if config.select == "movement":
        return weights.movement(model, Path(str(config.explored)))
    by_rows = {"fisher": rows.fisher, "gradient": rows.gradient}[config.select]
    wanted_by = f"select={config.select}"
    return by_rows(model, config, public.sequences(config, model.base.tokenizer, labels, wanted_by))
