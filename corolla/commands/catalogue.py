"""All strategies side by side, from what their own code says: for people, pages and scripts."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from corolla.config.asked import not_noised
from corolla.config.sums import not_summed
from corolla.host.text import human_bytes
from corolla.interfaces import Stacking, Strategy, Traits
from corolla.strategies.listing.registry import STRATEGIES, traits
from corolla.types import Aggregates, Cost, Size, TrainerName

COHORT, ROUNDS = 8, 10
QUERIES = 50
"""Directions that a zeroth-order client measures in a round, as the config has it."""

REFERENCES: Mapping[str, Size] = {
    "embedded model, all linear layers, rank 8": Size(35_840, 38_912, rank=8, modules=28),
    "Llama-3.2-3B, q and v, rank 16": Size(2_752_512, 1_835_008, rank=16, modules=56),
    "Llama-3.2-3B, all linear layers, rank 32": Size(23_855_104, 24_772_608, rank=32, modules=196),
}
"""Adapters whose bytes are shown, by name; no head."""

AGGREGATES: Mapping[Aggregates, str] = {
    "weights": "effective weights",
    "factors": "A and B apart",
    "other": "by a rule of its own",
}
_HEADER = """\
# Strategies

Written by `corolla strategies --markdown` from the code itself, with the defaults of each strategy.

"""
_COMBINED = """
## What they average, and what they go with

What is averaged, each client by the number of different examples that it trained on in the
round: "effective weights" is exact; "A and B apart" is not, unless
clients agree on one of them, and is the mean of the weights themselves where all parameters or any
tensors are trained. `corolla check` proves it. Secure sum: the server needs no more than the sum
over clients, and with `secure_sum=true` learns no more. DP: that sum can carry the noise of
dp=client. Keeps: devices keep
something between rounds. Late: an update made from an older state can still be applied.

"""
_BYTES = f"""
## Bytes of a client in a round

Of training alone: cohorts of {COHORT}, fp32, {QUERIES} queries of zeroth-order clients, no codec,
no head. "Once": what a client receives in its first round, and again when it has missed a change.
"Or": in odd and even rounds, or with and without backpropagation. What is sent once of each round
(blocks of `flora` and `fedex_lora`, rows of `seed_pool` and `ferret`) comes in addition for rounds
that were missed.

"""
_RANKS = f"""
## What a run ends in

Ranks and bytes of `adapter/`, with cohorts of {COHORT}, after {ROUNDS} rounds. What a strategy
stacks grows until it has the full rank of the modules, or `max_rank`, to which each round is cut;
`served/` has rank 64 at most (`served_rank`).

"""


@dataclass(frozen=True)
class Entry:
    """The catalogue's entry of one strategy. `costs`: reference → the costs of its clients.

    There is more than one cost where rounds or trainers differ. `ranks`: reference → the rank of
    the adapter before the first round, and what each round adds.
    """

    name: str
    title: str
    papers: Sequence[str]
    aggregates: Aggregates
    trainers: Sequence[TrainerName]
    mixed_ranks: bool
    full: bool
    secure_sum: bool
    dp: bool
    traits: Traits
    costs: Mapping[str, Sequence[Cost]]
    ranks: Mapping[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, traits beside the rest."""
        known = asdict(self)
        own: dict[str, Any] = known.pop("traits")
        return own | known


def entries() -> list[Entry]:
    """All strategies with their defaults, in the order of the registry."""
    return [_entry(name, cls) for name, cls in STRATEGIES.items()]


def _entry(name: str, cls: type[Strategy]) -> Entry:
    about, own = sys.modules[cls.__module__].__doc__ or "", traits(cls)
    return Entry(
        name=name,
        title=about.partition("\n")[0].rstrip("."),
        papers=re.findall(r"\b\d{4}\.\d{5}\b", about),
        aggregates=cls.aggregates,
        trainers=cls.trainers,
        mixed_ranks=cls.mixed_ranks,
        full=cls.full,
        secure_sum=not not_summed(cls),
        dp=not own.personal and not not_noised(cls()),
        traits=own,
        costs={reference: costs(cls(), size) for reference, size in REFERENCES.items()},
        ranks={reference: ranks(cls(), size) for reference, size in REFERENCES.items()},
    )


def ranks(strategy: Strategy, size: Size) -> tuple[int, int]:
    """(rank of the adapter before the first round, what a round of COHORT such adapters adds)."""
    if not isinstance(strategy, Stacking):
        return size.rank, 0
    before, after = (strategy.rank_after(rounds, [size] * COHORT) for rounds in (0, 1))
    return before, after - before


def costs(strategy: Strategy, size: Size) -> list[Cost]:
    """The different costs of a client in a cohort of COHORT adapters of that size."""
    found: list[Cost] = []
    for round in (1, 2):  # factors may be trained in turn
        cohort = [
            replace(size, trainer=trainer, scalars=QUERIES, round=round)
            for trainer in (strategy.trainers * COHORT)[:COHORT]
        ]
        found += strategy.cost(cohort)
    return list(dict.fromkeys(found))


def markdown() -> str:
    """A page: what each strategy is for, what it can be combined with, and its bytes."""
    known = entries()
    about = [(e.title, _links(e.papers), e.traits.when) for e in known]
    able = [_can(e) for e in known]
    paid = [[cell for found in e.costs.values() for cell in _bytes(found)] for e in known]
    ends = [[name, *cells] for name, cells in _ends(known, [*REFERENCES])]
    ways = [f"{reference}: {way}" for reference in REFERENCES for way in ("sent", "received")]
    return (
        _HEADER
        + _table(known, ("what it is", "papers", "when to use it"), about)
        + _COMBINED
        + _table(known, _CAN, able)
        + _BYTES
        + _table(known, ways, paid)
        + _RANKS
        + _lines(
            [["strategy", *[f"{name}: {what}" for name in REFERENCES for what in _ENDS]], *ends]
        )
    )


def print_catalogue(console: Console) -> None:
    """The same for a terminal, in short: three tables, which fit 80 columns."""
    known, reference = entries(), "Llama-3.2-3B, q and v, rank 16"
    uses = Table("strategy", "when to use it", box=box.SIMPLE_HEAD)
    costs = Table("strategy", "averages", "sent", "received", box=box.SIMPLE_HEAD)
    ends = Table("strategy", *_ENDS, box=box.SIMPLE_HEAD)
    for e in known:
        uses.add_row(e.name, e.traits.when)
        costs.add_row(e.name, AGGREGATES[e.aggregates], *_bytes(e.costs[reference]))
    console.print(uses)
    console.print(f"bytes of a client in a round: {reference}, cohorts of {COHORT}")
    console.print(costs)
    console.print(f"adapter/ of a run of {ROUNDS} rounds, with the same; max_rank bounds its rank")
    for name, cells in _ends(known, [reference]):
        ends.add_row(name, *cells)
    console.print(ends)


_ENDS = ("rank of adapter/", "its size")


def _ends(known: Sequence[Entry], references: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """(strategy, cells of _ENDS for each reference); those whose rank does not grow are one row."""
    found = {e.name: [cell for name in references for cell in _end(e, name)] for e in known}
    growing = [e.name for e in known if any(grows for _, grows in e.ranks.values())]
    rest = next(name for name in found if name not in growing)
    return [*((name, found[name]) for name in growing), ("all others", found[rest])]


def _end(e: Entry, reference: str) -> tuple[str, str]:
    """The rank that the adapter of a run has, and its bytes after ROUNDS rounds."""
    size, (before, grows) = REFERENCES[reference], e.ranks[reference]
    count = 4 * (size.A + size.B) * (before + ROUNDS * grows) // size.rank
    if not grows:
        return f"{before}", human_bytes(count)
    return f"{before} + {grows} a round".removeprefix("0 + "), f"≤ {human_bytes(count)}"


_CAN = (
    *("averages", "clients", "trains", "ranks", "secure sum", "DP"),
    *("optimizers", "keeps", "late", "personal"),
)


def _can(e: Entry) -> list[str]:
    """A cell for each column of _CAN."""
    trained = ["adapters"] + ["any tensors"] * (e.full or e.traits.dense)
    return [
        AGGREGATES[e.aggregates],
        " and ".join(trainer.replace("_", " ") for trainer in e.trainers),
        ", ".join(trained),
        "mixed" if e.mixed_ranks else "one",
        _yes(e.secure_sum),
        _yes(e.dp),
        ", ".join(e.traits.optimizers) if "first_order" in e.trainers else "–",
        _yes(e.traits.keeps),
        _yes(e.traits.stale),
        _yes(e.traits.personal),
    ]


def _bytes(found: Sequence[Cost]) -> tuple[str, str]:
    """(sent, received) for people."""
    limit = "≤ " if any(cost.at_most for cost in found) else ""

    def cell(values: Iterable[int]) -> str:
        return " or ".join(dict.fromkeys(limit + human_bytes(value) for value in values))

    once = cell(cost.once for cost in found if cost.once)
    received = cell(cost.down for cost in found)
    return cell(cost.up for cost in found), received + (f", once {once}" if once else "")


def _links(papers: Sequence[str]) -> str:
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)


def _yes(value: bool) -> str:
    return "yes" if value else "–"


def _table(known: Sequence[Entry], head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    named = [[f"`{e.name}`", *row] for e, row in zip(known, rows, strict=True)]
    return _lines([["strategy", *head], *named])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """A table, whose first row is its head."""
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
