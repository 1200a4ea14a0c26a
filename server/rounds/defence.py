"""The robust rule of a round, and the norms of earlier rounds that it goes by."""

import hashlib

import torch

from corolla.aggregation.robust import Robust
from corolla.config.asked import compared_in
from corolla.server.rounds import expectations
from corolla.server.rounds.call import RoundCall
from corolla.types import Payload

_NORMS = "norms"
"""The group of a server's memory with the median norm of the updates of each round."""


def defence_of(call: RoundCall) -> Robust | None:
    """Returns the Robust before the strategy's aggregator.

    It has the norms of earlier rounds like this one.
    """
    config, strategy = call.federation.config, call.federation.strategy
    if config.robust == "none":
        return None
    kept = call.memory.get(_NORMS, {}).get(_phase(call))
    history = () if kept is None else kept.tolist()
    space = compared_in(config, strategy)
    return Robust(config.robust, strategy.aggregator, space, config.byzantine, history)


def norms_after(call: RoundCall, defence: Robust) -> Payload:
    """The norms to remember, with those of this round: a group of the server's memory."""
    history = {_phase(call): torch.tensor(defence.history)}
    return {_NORMS: {**call.memory.get(_NORMS, {}), **history}}


def _phase(call: RoundCall) -> str:
    """A name for the tensors that this round's updates have: other ones are of another size."""
    like = expectations.first_like(call.federation, call.number)
    names = [f"{group}/{name}" for group in sorted(like) for name in sorted(like[group])]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
