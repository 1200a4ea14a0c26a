"""Rounds of a strategy with a sparse set: against whole weight matrices, in fp64.

The server sends places that no client draws by itself, so that a client without them would show.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from corolla.commands.check import oracle
from corolla.commands.check.findings import Finding, Proof, Worst
from corolla.commands.check.probe import Probe, Round
from corolla.commands.check.tables import BRIEFLY
from corolla.config.asked import without_factors
from corolla.directions import moving
from corolla.models.pretrained import Base
from corolla.models.sparse import carried, places
from corolla.models.sparse_model import SparseModel
from corolla.strategies.listing import registry
from corolla.types import Params, Payload

CHECK = "sparse sets"
_CHANGES = {"parameters": "sparse", "rank": 2, "ranks": [], "alphas": []}
_PLACES = 1
"""The seed of the places that are sent; models draw theirs from that of the run, 0."""


class _SparseProbe(Probe):
    """A strategy on a tiny model with a sparse set."""

    @property
    def sparse(self) -> SparseModel:
        """The resident model, as `_resident` makes it."""
        return cast(SparseModel, self.model)

    def fresh(self) -> Payload:
        model = self.sparse
        chosen = places.random(model.sizes, model.counts, _PLACES)
        return {**super().fresh(), carried.GROUP: places.packed(chosen, model.sizes)}

    def deltas(self, state: Payload) -> Params:
        carried.hold(self.model, state)
        return super().deltas(state)

    def _resident(self, base: Base) -> SparseModel:
        self.base = {n: p.detach().clone() for n, p in base.model.named_parameters()}
        return SparseModel(base, self.config.rank, seed=self.config.seed)

    def lost(self) -> float:
        """The number of values of the base that are others where no change is shown."""
        model = self.sparse
        model.write(model.init(self.config.lora, 0), self.config.lora)
        for own in model.modules.values():
            own.put()
        now = {f"{name}.weight": weight for name, weight in model.originals.items()}
        plain = dict(model.base.model.named_parameters())
        now |= {n: p for n, p in plain.items() if n in self.base}
        return float(sum(int((now[n] != tensor).sum()) for n, tensor in self.base.items()))


def proofs(probe: Probe) -> Iterator[Proof]:
    """The proof that a strategy's claim holds of a sparse set, where it can train one."""
    if without_factors(probe.strategy) and not registry.traits(probe.strategy).personal:
        yield CHECK, lambda: _as_claimed(probe)


def _as_claimed(probe: Probe) -> Finding:
    """Each round leads to the claimed mean of whole models, and nothing else has moved a bit."""
    worst = Worst()
    with tempfile.TemporaryDirectory() as folder:
        own = _SparseProbe(probe.name, probe.kind, Path(folder), probe.options, _CHANGES)
        done = list(own.rounds(BRIEFLY))
        for number, round in enumerate(done):
            worst.see(_error(own, done[: number + 1]), f"round {round.number} is another model")
        worst.see(own.lost(), "values are changed that are not in the set")
    return worst.finding(CHECK, probe.kind, oracle.limit_of(probe.strategy))


def _error(probe: Probe, done: Sequence[Round]) -> float:
    """The relative error of the last round against what the strategy claims."""
    last, seen = done[-1], [round.observed for round in done]
    if oracle.claim_of(probe.strategy) != "expected":
        return oracle.errors(probe, last.result.state, seen, last.deltas)[0]
    expected: Params = probe.strategy.expected(seen)  # type: ignore[attr-defined]
    adapter = probe.strategy.adapter(last.result.state)
    return oracle.relative(moving.settle(adapter.trained, adapter.moves), expected)
