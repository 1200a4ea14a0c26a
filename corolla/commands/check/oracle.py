"""The model that a round should have led to: dense computations in fp64 on the clients' models."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from corolla.commands.check.findings import Finding
from corolla.commands.check.probe import Probe
from corolla.interfaces import Observed, Strategy
from corolla.strategies.listing import registry
from corolla.tensors import factors, tree
from corolla.types import Params, Payload

EXACT = 1e-6
"""Largest relative error of effective weights, in fp32."""

COARSEST = 2.0**-8
"""Largest rounding that a strategy may claim for itself: that of bfloat16."""

Claimed = Literal["weights", "factors", "expected", "nothing"]
"""A mean of effective weights, of factors, what the strategy says to expect; or no claim."""

CLAIMS: Mapping[Claimed, str] = {
    "weights": "mean of effective weights",
    "factors": "mean of factors",
    "expected": "as expected",
    "nothing": "aggregate is finite",
}
"""Claim → the name of its check."""


def claim_of(strategy: Strategy | type[Strategy]) -> Claimed:
    """Returns the claim to check: "weights" or "factors", "expected", or "nothing"."""
    if strategy.aggregates != "other" and getattr(strategy, "exact", True):
        return strategy.aggregates
    return "expected" if hasattr(strategy, "expected") else "nothing"


def shares_of(strategy: Strategy, observed: Observed) -> Mapping[str, float]:
    """Returns client → its weight in the mean: its examples, or that of the strategy's `shares`."""
    own = getattr(strategy, "shares", None)
    found: Mapping[str, float] = observed.weights if own is None else own(observed)
    return found


def limit_of(strategy: Strategy) -> float:
    """The largest error that passes, whatever rounding a strategy says that it has."""
    return EXACT + min(float(getattr(strategy, "rounding", 0.0)), COARSEST)


def errors(
    probe: Probe, state: Payload, rounds: Sequence[Observed], deltas: Mapping[str, Params]
) -> tuple[float, float]:
    """(error of `state` against what is claimed, its distance from the exact weighted mean).

    `rounds` are all up to the one that led to `state`, `deltas` what each model of its clients
    added to the base weights.
    """
    last, claim = rounds[-1], claim_of(probe.strategy)
    p = shares_of(probe.strategy, last)
    ideal = weighted_mean(deltas, p)
    reached = probe.deltas(state)
    gap = relative(reached, ideal)
    if claim == "nothing":
        return (0.0 if all(tree.finite(own) for own in state.values()) else math.inf), gap
    if claim == "expected":
        return _against_expected(probe, state, rounds, reached), gap
    if claim == "weights":
        return gap, gap
    means = weighted_mean(last.trained, p)
    scaling = probe.config.lora.scaling
    expected = {m: scaling * factors.product(means, m) for m in factors.modules(means)}
    expected |= {n: t for n, t in ideal.items() if n not in expected}  # the head is a mean itself
    covariance = _covariance(last.trained, p, means, scaling)
    off = relative({m: reached[m] + covariance[m] for m in covariance}, ideal)
    return max(relative(reached, expected), off), gap


def as_declared(probe: Probe, errors: Iterable[tuple[float, float]]) -> Finding:
    """The largest error of all rounds against what the strategy declares to aggregate."""
    worst, gap = (
        max(column, key=lambda error: (math.isnan(error), error))
        for column in zip(*errors, strict=True)
    )
    claim, kind = claim_of(probe.strategy), probe.kind
    note = f"{gap:.1%} off the mean of effective weights"
    if claim == "nothing":
        return Finding(CLAIMS[claim], kind, worst, 0.0, f"{note} (no claim to check)")
    if claim == "factors":
        note += " = the weighted covariance of A and B"
    shown = "" if claim == "weights" else note
    return Finding(CLAIMS[claim], kind, worst, limit_of(probe.strategy), shown)


def relative(found: Params, wanted: Params) -> float:
    """Joint Frobenius norm of the difference over that of `wanted`, over the names of `found`."""
    off = tree.norm({n: found[n].double() - wanted[n].double() for n in found})
    return off / max(tree.norm({n: wanted[n] for n in found}), 1e-30)


def _against_expected(
    probe: Probe, state: Payload, rounds: Sequence[Observed], reached: Params
) -> float:
    """How far the global adapter is from what the strategy says to expect of all its tensors."""
    expect = getattr(probe.strategy, "expected", None)
    expected: Params = expect(rounds) if expect else {}
    if registry.traits(probe.strategy).personal:
        trained = probe.strategy.adapter(state).trained
        _require(expected, trained)
        return relative(trained, expected)
    scaling = probe.config.lora.scaling
    dense = {m: scaling * factors.product(expected, m) for m in factors.modules(expected)}
    start = probe.model.init(probe.config.lora, 0)
    heads = factors.select(expected, factors.is_head)
    dense |= {n: t.double() - start[n].double() for n, t in heads.items()}
    _require(dense, reached)
    return relative(reached, dense)


def _require(said: Params, names: Params) -> None:
    """Raises ValueError for a tensor that `expected` says nothing of: it would be unproven."""
    if lacking := sorted(names.keys() - said.keys()):
        raise ValueError(f"expected() says nothing of {len(lacking)} tensors, first {lacking[0]!r}")


def _covariance(
    trained: Mapping[str, Params], p: Mapping[str, float], means: Params, scaling: float
) -> dict[str, Tensor]:
    """S Σ p_m (B_m - B̄)(A_m - Ā): by which averaging factors misses the mean of products."""
    centred = {c: tree.sub(trained[c], means) for c in p}
    return {
        m: scaling * torch.stack([w * factors.product(centred[c], m) for c, w in p.items()]).sum(0)
        for m in factors.modules(means)
    }


def weighted_mean(values: Mapping[str, Params], p: Mapping[str, float]) -> dict[str, Tensor]:
    """Σ p_m values[m], name by name in fp64."""
    names = next(iter(values.values()))
    return {n: torch.stack([w * values[c][n].double() for c, w in p.items()]).sum(0) for n in names}
