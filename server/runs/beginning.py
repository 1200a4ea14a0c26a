"""The state of a run before its first round."""

from corolla.selection import exchange
from corolla.selection.choose import places_of
from corolla.server.rounds.federation import Federation
from corolla.server.runs.checkpoint import Checkpoint
from corolla.server.runs.evaluate import Evaluator
from corolla.starts import table as starts
from corolla.types import Params


def checkpoint(federation: Federation, evaluator: Evaluator, fresh: Params) -> Checkpoint:
    """The start that the run asks for, and the places of its sparse set, before any round.

    `fresh` is an adapter that starts by itself. Raises ConfigError, DataError, ArtefactError and
    ModelError for a start, or places, that cannot be made.
    """
    config, model, labels = federation.config, evaluator.model, evaluator.labels
    state = federation.strategy.init(fresh, config.seed)
    if config.start != "random":
        state = starts.begin(model, fresh, config, labels).state(federation.strategy, config.seed)
    places = places_of(model, config, labels)
    if config.regrow and exchange.due(config, config.regrow):
        exchange.public_rows(model, config, labels)  # a mistake in them is found before any round
    return Checkpoint(federation.run_id, 0, {**state, **places}, {})
