"""The starts of an adapter by the names that the key `start` takes: facts, one row each.

How a start is made stands in corolla/starts, with a row for each name as well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PISSA = re.compile(r"pissa_[1-9]\d?")
_FOLDER = re.compile(r"[/\\]|^[~.]")


@dataclass(frozen=True)
class Start:
    """The facts of a start that settings, refusals and estimates ask for."""

    name: str
    makes: str
    """The adapter that it makes, in a clause."""
    rows: bool = False
    """True where the start is made from public rows."""
    offset: bool = False
    """True where the start takes a part out of the base: its negative stays beside the base."""
    weights: bool = True
    """True where the start needs the weights of the base as they were trained: none quantised."""
    frozen: str = ""
    """The factor that ffa_lora has to freeze, for a start that means nothing elsewhere: A, B, or
    either."""
    zero: str = ""
    """The factor that is zero: it is the one to train first."""
    still: bool = False
    """True where the model with the start is the base, and any strategy may train both factors."""


_ROWS = (
    Start("random", "A random, B zero", weights=False, zero="B", still=True),
    Start("gradient", "the best factors of AdamW's first step on public rows", rows=True),
    Start("pissa", "the largest singular directions of each weight", offset=True),
    Start("olora", "the first columns of each weight's QR", offset=True),
    Start("orthogonal", "random factors whose product is zero", weights=False, still=True),
    Start("mica", "the smallest left singular directions, A zero", frozen="B", zero="A"),
    Start("lora_ga", "singular directions of the gradient on public rows", True, True),
    Start("corda_ipm", "the directions that the inputs of public rows use most", True, True),
    Start("corda_kpm", "the directions that the inputs of public rows use least", True, True),
    Start(
        "eva",
        "the main directions of each layer's inputs on public rows, B zero",
        rows=True,
        weights=False,
        zero="B",
        still=True,
    ),
    Start("loftq", "the part of each weight that quantisation lost", weights=False),
    Start("channels", "random channels of each layer", weights=False, frozen="either"),
    Start("channels_large", "the channels of each layer with the largest weights", frozen="either"),
    Start(
        "channels_small", "the channels of each layer with the smallest weights", frozen="either"
    ),
)

STARTS: Mapping[str, Start] = {row.name: row for row in _ROWS}
"""Name → start; `pissa_N` is pissa by N iterations, and a folder holds an adapter."""

FOLDER = Start("FOLDER", "an adapter that was trained before", weights=False)
"""The start from an adapter in the form of peft."""


def of(text: str) -> Start:
    """The start that a value of the key `start` names."""
    return STARTS.get("pissa" if _PISSA.fullmatch(text) else text, FOLDER)


def with_rows() -> str:
    """Names of all starts that are made from public rows."""
    return ", ".join(name for name, row in STARTS.items() if row.rows)


def still() -> str:
    """Names of the starts with which both factors are trained and the model is the base."""
    return " or ".join(name for name, row in STARTS.items() if row.still)


def checked(text: str) -> str:
    """Returns a name as it is, and a folder as an absolute path; of a run's folder, its adapter.

    Raises ValueError for neither.
    """
    if text in STARTS or _PISSA.fullmatch(text):
        return text
    folder = Path(text)
    if folder.is_dir():
        if (folder / "run.json").is_file() and (folder / "adapter").is_dir():
            folder = folder / "adapter"
        return str(folder.resolve())
    if _FOLDER.search(text):  # of another machine, perhaps: who begins a run says that it is gone
        return text
    raise ValueError(f"expected one of {', '.join(STARTS)}, pissa_N, or a folder with an adapter")
