"""The states before any round: of the untouched model, and of that which training begins at."""

from collections.abc import Sequence
from dataclasses import dataclass

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.interfaces import Strategy
from corolla.models.trainable import Trainable
from corolla.selection.choose import places_of
from corolla.starts import table as starts
from corolla.types import Payload


@dataclass(frozen=True)
class Beginning:
    """The states that a run knows before its first round."""

    untouched: Payload
    """Of a zero update."""
    initial: Payload
    """Of what training begins at: where a run goes on, it is that of `untouched`."""
    origin: str
    """The version that the log of a strategy begins with."""


def beginning(
    model: Trainable,
    config: RunConfig,
    strategy: Strategy,
    labels: Sequence[str],
    goes_on: bool,
) -> Beginning:
    """The first states of a run; those of one that goes on lack what it has made or chosen before.

    Raises as the starts of an adapter and the choice of a sparse set do.
    """
    fresh = model.init(config.lora, seeds.derive(config.seed, "init"))
    untouched = initial = strategy.init(fresh, config.seed)
    origin = seedlog.origin(model.base.fingerprint, untouched)
    if goes_on:
        return Beginning(untouched, initial, origin)
    if config.start != "random":
        initial = starts.begin(model, fresh, config, labels).state(strategy, config.seed)
    support = places_of(model, config, labels)
    return Beginning({**untouched, **support}, {**initial, **support}, origin)
