"""Abilities of a strategy that follow from what its code does, and that rules ask about."""

import torch

from corolla.aggregation.sums import ByGroup, SeedSums, WeightedMean
from corolla.interfaces import Aggregator, Strategy
from corolla.strategies import registry
from corolla.tensors import factors


def not_noised(strategy: Strategy) -> str:
    """Why noise on a sum of clipped updates would not make a strategy private; "" if it does."""
    traits = registry.traits(strategy)
    if traits.mirrors:
        return "the server sums up what its clients keep, and neither may be clipped nor noised"
    if traits.individual or not strategy.aggregator().linear:
        return "its updates are not added up, each is used by itself"
    if not traits.bounded:
        return "a clipped update may still move the model by any amount"
    if not _is_mean(strategy.aggregator()):
        return "what it adds up is not one mean over all clients, which noise could be put on"
    return ""


def takes_start(strategy: Strategy) -> bool:
    """Returns whether first-order clients get the strategy's start adapter, at its scaling."""
    if "first_order" not in strategy.trainers:
        return False
    one, scaling = torch.ones(1, 1), 2.0
    state = strategy.init({"m" + factors.A: one, "m" + factors.B: one}, 0)
    found = strategy.adapter(state)
    parts = [factors.bake(p, scaling) for p in (found.trained, *found.residuals)] + [*found.frozen]
    total = sum(
        float(factors.product(p, m))
        for p in parts
        for m in factors.modules(p)
        if m + factors.B in p
    )
    return strategy.broadcast(state).log is None and abs(total - scaling) < 1e-5


def _is_mean(aggregator: Aggregator) -> bool:
    """Returns whether an aggregator makes nothing of clients' updates but their mean."""
    if isinstance(aggregator, ByGroup):
        return all(map(_is_mean, aggregator.groups.values()))
    return type(aggregator) in (WeightedMean, SeedSums)  # a subclass may keep single updates
