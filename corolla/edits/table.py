"""Name of a step → what it does to the updates of one module."""

from collections.abc import Callable, Mapping, Sequence

from corolla.edits import arithmetic, dare, intruders, lines, ranks, reset, safe, ties
from corolla.edits.grammar import Step
from corolla.edits.job import Job, weight
from corolla.edits.update import Low, Update, times

Updates = Sequence[Update]
Bound = Callable[[str, Updates], Updates]
"""(module, its updates, one an adapter) → those after a step."""


def bind(step: Step, job: Job) -> Bound:
    """A step, ready for one module after another.

    Raises ArtefactError or ModelError for what it needs and is not there.
    """
    return _STEPS[step.name](job, *step.values)


def _weights(job: Job, *given: float) -> Bound:
    def step(module: str, updates: Updates) -> Updates:
        return [arithmetic.combine(updates, given or [1 / len(updates)] * len(updates))]

    return step


def _ties(job: Job, density: float, strength: float) -> Bound:
    return lambda module, updates: [ties.merge(updates, density, strength)]


def _dare(job: Job, density: float, seed: int) -> Bound:
    return lambda module, updates: [
        dare.drop(own, density, seed, module, number) for number, own in enumerate(updates)
    ]


def _scale(job: Job, number: float) -> Bound:
    return lambda module, updates: [times(own, number) for own in updates]


def _lines(job: Job, alpha: float, beta: float | None) -> Bound:
    lines.check(job.shapes, job.blocks)

    def step(module: str, updates: Updates) -> Updates:
        factor = lines.factor(module, alpha, beta, job.blocks)
        return [times(own, factor) for own in updates]

    return step


def _reset(job: Job, share: float, seed: int) -> Bound:
    zero = reset.chosen(job.shapes, share, seed)
    return lambda module, updates: [times(own, 0.0) if module in zero else own for own in updates]


def _intruders(job: Job, first: int, eps: float, keep: float) -> Bound:
    stored = job.weights

    def step(module: str, updates: Updates) -> Updates:
        base = weight(stored, module)
        return [intruders.mitigate(own, base, first, eps, keep) for own in updates]

    return step


def _safe(job: Job, unaligned: str, aligned: str, tau: float, published: str) -> Bound:
    before, after = job.open(unaligned), job.open(aligned)

    def step(module: str, updates: Updates) -> Updates:
        difference = weight(after, module) - weight(before, module)
        projection = safe.projector(difference, bool(published))
        return [safe.project(own, projection, tau) for own in updates]

    return step


def _balance_head(job: Job) -> Bound:
    return lambda module, updates: updates


def _rank(job: Job, rank: int | None) -> Bound:
    most = rank or job.rank
    return _cutting(job, f"rank:{most}", lambda own: ranks.cut(own, most))


def _energy(job: Job, share: float) -> Bound:
    return _cutting(job, f"energy:{share:g}", lambda own: ranks.keep(own, share))


def _cutting(job: Job, written: str, cut: Callable[[Update], ranks.Cut]) -> Bound:
    noted = job.cutting(written)

    def step(module: str, updates: Updates) -> Updates:
        cuts = [cut(own) for own in updates]
        for own in cuts:
            noted.note(module, own)
        lows: list[Low] = [own.update for own in cuts]
        return lows

    return step


_STEPS: Mapping[str, Callable[..., Bound]] = {
    "weights": _weights,
    "ties": _ties,
    "dare": _dare,
    "scale": _scale,
    "lines": _lines,
    "reset": _reset,
    "intruders": _intruders,
    "safe": _safe,
    "balance-head": _balance_head,
    "rank": _rank,
    "energy": _energy,
}
"""One for each of grammar.FORMS, with its arguments in their order."""
