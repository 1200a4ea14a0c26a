"""Rounds of a strategy that stacks factors, with the key `max_rank`: against dense SVDs in fp64."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from corolla.commands.check import oracle
from corolla.commands.check.findings import Finding, Proof, Worst
from corolla.commands.check.probe import Probe, Round
from corolla.commands.check.tables import BRIEFLY, MAX_RANK
from corolla.interfaces import Stacking
from corolla.tensors import factors, tree
from corolla.types import Params

BEST, SUM = "best of max_rank", "max_rank adds up"


@dataclass(frozen=True)
class _Cut:
    """One round: the model without the cut, the model after it, and the error that was told."""

    number: int
    start: Params
    exact: Params
    """The effective weights of the modules that have factors, dense."""
    reached: Params
    told: float

    @property
    def lost(self) -> float:
        """The Frobenius norm of what the round says that it has cut off."""
        return self.told * tree.norm(self.exact)


def proofs(probe: Probe) -> Iterator[Proof]:
    """All that must hold of a strategy with `max_rank`; nothing where its rank does not grow."""
    if isinstance(probe.strategy, Stacking):
        cuts = cache(partial(_cuts, probe))
        yield BEST, lambda: _best(probe.kind, cuts())
        yield SUM, lambda: _bounded(probe.kind, cuts())


def _cuts(probe: Probe) -> list[_Cut]:
    """A few rounds with `max_rank`, of a state that was never larger."""
    with tempfile.TemporaryDirectory() as folder:
        own = Probe(probe.name, probe.kind, Path(folder), probe.options, {"max_rank": MAX_RANK})
        return [_cut(own, round) for round in own.rounds(BRIEFLY)]


def _cut(probe: Probe, round: Round) -> _Cut:
    """`exact` is of the same updates, folded in again and applied without a cut."""
    aggregator = probe.strategy.aggregator()
    for client, examples in round.result.num_examples.items():
        aggregator.add(round.observed.updates[client], float(examples))
    whole, _ = probe.strategy.apply(round.state, aggregator.finalise())
    modules = factors.modules(round.observed.start)
    start, exact, reached = (
        {m: deltas[m] for m in modules}
        for deltas in map(probe.deltas, (round.state, whole, round.result.state))
    )
    return _Cut(round.number, start, exact, reached, float(round.result.metrics["rank_error"]))


def _best(kind: str, cuts: Sequence[_Cut]) -> Finding:
    """Each round ends in the best model of the rank, and tells how far it is from the exact one."""
    worst = Worst()
    for cut in cuts:
        tails = [torch.linalg.svdvals(m)[MAX_RANK:] for m in cut.exact.values()]
        least = float(torch.cat(tails).norm()) / tree.norm(cut.exact)
        worst.see(
            abs(cut.told - least), f"round {cut.number} tells {cut.told:.6f}, not {least:.6f}"
        )
        found = oracle.relative(cut.reached, cut.exact)
        worst.see(
            abs(found - least), f"round {cut.number} is {found:.6f} off, the best {least:.6f}"
        )
        for module, update in cut.reached.items():
            s = torch.linalg.svdvals(update)
            rest = float(s[MAX_RANK:].norm() / s.norm())
            worst.see(rest, f"{module} has more than rank {MAX_RANK} after round {cut.number}")
    return worst.finding(BEST, kind, oracle.EXACT)


def _bounded(kind: str, cuts: Sequence[_Cut]) -> Finding:
    """After all rounds the model is no further from the sum of their exact moves than they told."""
    moves = {
        m: torch.stack([cut.exact[m] - cut.start[m] for cut in cuts]).sum(0) for m in cuts[0].exact
    }
    off = tree.norm(tree.sub(cuts[-1].reached, moves))
    over = (off - sum(cut.lost for cut in cuts)) / tree.norm(moves)
    note = f"{off:.3e} off, where the rounds told {sum(cut.lost for cut in cuts):.3e} together"
    return Finding(SUM, kind, max(over, 0.0), oracle.EXACT, note if over > oracle.EXACT else "")
