"""The places of a sparse set, which parameters=sparse trains."""

from typing import Literal

from corolla.config.sections.section import Positive, key
from corolla.config.sections.subject import Subject

SelectName = Literal["random", "magnitude", "principal", "fisher", "movement", "gradient"]

READS_ROWS: tuple[SelectName, ...] = ("fisher", "gradient")
"""Choices of places that read public rows."""


class SparseSet(Subject):
    """The choice of the places of weight matrices whose values are trained, by the server."""

    select: SelectName = key(
        "random",
        "The values of each weight matrix that parameters=sparse trains, as many as LoRA of `rank` "
        "has: random ones; the largest (magnitude), also in the matrix's part of rank `spectrum` "
        "(principal); those with the largest squared gradients of single public rows (fisher), or "
        "the largest gradient over all (gradient); or those that an adapter has moved most "
        "(movement).",
        "principal",
        beside="parameters=sparse",
        against=("parameters=lora",),
        unsaid=True,
    )
    spectrum: Positive = key(
        128,
        "The rank of the part of a weight matrix in which select=principal looks for the largest "
        "values.",
        32,
        beside="parameters=sparse select=principal",
        unsaid=True,
    )
    explored: str | None = key(
        None,
        "The folder of a LoRA adapter of the same base, as a run before has saved it: "
        "select=movement trains the values that it has changed most.",
        "runs/exploration/adapter",
        effect="none",
        beside="parameters=sparse select=movement",
        against=("select=random",),
        unsaid=True,
    )

    regrow: Positive | None = key(
        None,
        "The number of rounds after which some places of a sparse set are exchanged, again and "
        "again: those whose values have changed least for those with the largest gradients on "
        "`public` rows (SpIEL). A fifth of them at first, fewer with each round.",
        2,
        effect="none, places stay",
        beside="parameters=sparse public=public.jsonl",
        against=("parameters=lora", "public=null", "strategy=fedavgm", "buffer=2"),
        unsaid=True,
    )

    @property
    def selects_by_rows(self) -> bool:
        """True where places are chosen by gradients on public rows, at first or later."""
        return self.select in READS_ROWS or self.regrow is not None
