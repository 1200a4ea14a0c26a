"""The units of a set of trained tensors: blocks and their modules, and what is outside of blocks.

A model is a stack of like blocks; the number of a block is the first number in the names of its
tensors, as peft reads `layers_to_transform`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

import torch

BLOCK = "layer-"
"""Prefix of the number of a unit that is a block, or a module of one."""
OUTSIDE = ("embed", "norm", "head")
"""Units outside of blocks: embeddings, the last norm, and all else, as an output layer."""

_EMBED = re.compile(r"embed|wte|wpe|shared|\bemb\b", re.IGNORECASE)
_NORM = re.compile(r"norm|\bln_", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@lru_cache(1 << 14)  # estimates ask for the same names often
def block(name: str) -> tuple[str, int] | None:
    """Returns the stack and the number of a module's block; None for a module outside of blocks."""
    before, _, after = name.partition(".")
    while after:
        part, _, rest = after.partition(".")
        if part.isdecimal() and rest:
            return before, int(part)
        before, after = f"{before}.{part}", rest
    return None


def known(unit: str) -> bool:
    """Returns whether a name is that of a unit."""
    return unit.startswith(BLOCK) or unit in OUTSIDE


def of(names: Collection[str], modules: bool = False) -> dict[str, tuple[str, ...]]:
    """Unit → its tensors, in the order of blocks; those outside of blocks come last.

    `layer-0007` is the eighth block that has tensors, `layer-0007.02` its third module; a module
    is a matrix with its bias, or the factors of one.
    """
    found: dict[str, list[str]] = {}
    inside: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        if place := block(name):
            inside.setdefault(place, []).append(name)
    for number, (_, own) in enumerate(sorted(inside.items())):
        parts = sorted(set(map(_module, own))) if modules else []
        for name in own:
            part = f".{parts.index(_module(name)):02d}" if modules else ""
            found.setdefault(f"{BLOCK}{number:04d}{part}", []).append(name)
    for role in OUTSIDE:
        if own := sorted(name for name in names if not block(name) and _role(name) == role):
            found[role] = own
    return {unit: tuple(own) for unit, own in found.items()}


def always(units: Iterable[str], roles: Collection[str]) -> set[str]:
    """Returns the units of these roles; a model whose output layer is tied has it in `embed`."""
    there = set(units)
    wanted = set(roles)
    if "head" in wanted and "head" not in there:
        wanted.add("embed")
    return there & wanted


def blocks(units: Iterable[str]) -> list[str]:
    """Returns the units that are blocks, or modules of blocks, in their order."""
    return [unit for unit in units if unit.startswith(BLOCK)]


def half(units: Mapping[str, Sequence[str]], generator: torch.Generator) -> set[str]:
    """Draws half of the modules of each block: of attention, of the feed-forward, of the norms.

    Of an odd number one more in every other block, so that it is half of them over all blocks.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for unit in blocks(units):
        kinds.setdefault((unit.partition(".")[0], _kind(units[unit][0])), []).append(unit)
    found: set[str] = set()
    for (place, _), own in kinds.items():
        count = (len(own) + int(place.removeprefix(BLOCK)) % 2) // 2
        order = torch.randperm(len(own), generator=generator).tolist()
        found |= {own[i] for i in order[:count]}
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _role(name: str) -> str:
    """The role of a tensor outside of blocks. A norm of embeddings goes with them."""
    if _EMBED.search(name):
        return "embed"
    return "norm" if _NORM.search(name) else "head"


def _kind(name: str) -> str:
    """The kind of a module within a block, by a tensor of it."""
    if _NORM.search(name):
        return "norm"
    return "attention" if _ATTENTION.search(name) else "feed-forward"
