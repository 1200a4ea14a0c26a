"""The mark of a strategy that is one of Corolla's own: `registry` lists what bears it."""

from typing import TypeVar

from corolla.interfaces import Strategy

S = TypeVar("S", bound=type[Strategy])

LISTED: list[type[Strategy]] = []
"""All that bear the mark, those in files of users included."""


def listed(cls: S) -> S:
    """Marks a class as a strategy; a type checker holds it against the protocol here."""
    LISTED.append(cls)
    return cls
