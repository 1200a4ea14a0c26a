"""A round of a strategy with magnitudes of DoRA: what is averaged, and how far off the models are.

Factors and magnitudes are averaged as the strategy averages all tensors. The mean of the clients'
weights is another model, since each W' = m (W + s B A) / ‖W + s B A‖ is a product and a quotient of
what is averaged apart: how far off is told, and is no failure.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from corolla.commands.check import oracle
from corolla.commands.check.findings import Finding, Proof
from corolla.commands.check.probe import Probe, Round
from corolla.config.asked import takes_magnitudes
from corolla.directions import moving
from corolla.models.dora_model import DoraModel
from corolla.models.pretrained import Base
from corolla.types import Params

CHECK = "magnitudes"
_CHANGES = {"dora": True}
_ROUNDED = 4e-6
"""The error that one rounding to fp32 makes, relative to a step: magnitudes do not begin at 0."""


class _DoraProbe(Probe):
    """A strategy on a tiny model with magnitudes."""

    def _resident(self, base: Base) -> DoraModel:
        return DoraModel(base)


def proofs(probe: Probe) -> Iterator[Proof]:
    """The proof that a strategy's claim holds of magnitudes, where it can train them."""
    if takes_magnitudes(probe.strategy):
        yield CHECK, lambda: _as_claimed(probe)


def _as_claimed(probe: Probe) -> Finding:
    """A round leads to the claimed mean of all tensors; the note tells how far off weights are."""
    with tempfile.TemporaryDirectory() as folder:
        own = _DoraProbe(probe.name, probe.kind, Path(folder), probe.options, _CHANGES)
        (round,) = own.rounds(1)
        start, reached = round.observed.start, _reached(own, round)
        error = oracle.relative(_moved(reached, start), _moved(_wanted(own, round), start))
        gap = _gap(own, round)
    note = f"{gap:.1%} off the mean of effective weights: directions and magnitudes apart"
    limit = oracle.limit_of(probe.strategy) + _ROUNDED
    return Finding(CHECK, probe.kind, error, limit, note)


def _reached(probe: Probe, round: Round) -> Params:
    adapter = probe.strategy.adapter(round.result.state)
    return moving.settle(adapter.trained, adapter.moves)


def _wanted(probe: Probe, round: Round) -> Params:
    """The tensors that the strategy claims for the end of the first round, in fp64."""
    seen = round.observed
    if oracle.claim_of(probe.strategy) == "expected":
        expected: Params = probe.strategy.expected([seen])  # type: ignore[attr-defined]
        return expected
    return oracle.weighted_mean(seen.trained, oracle.shares_of(probe.strategy, seen))


def _gap(probe: Probe, round: Round) -> float:
    """The distance of the global model from the mean of the clients' weights, relative to it."""
    shares = oracle.shares_of(probe.strategy, round.observed)
    mean = oracle.weighted_mean(round.deltas, shares)
    return oracle.relative(probe.deltas(round.result.state), mean)


def _moved(params: Params, start: Params) -> Params:
    return {name: params[name].double() - start[name].double() for name in start}
