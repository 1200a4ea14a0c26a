"""The one form of all rules that refuse a combination of settings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", contravariant=True)


@dataclass(frozen=True)
class Rule(Generic[T]):
    """A combination that is refused: when, for which reason, and what to do instead."""

    when: Callable[[T], object]
    """True, or anything that counts as true, of what is refused."""
    why: Callable[[T], str]
    instead: Callable[[T], str] | str = ""


def refusal(rules: Iterable[Rule[T]], asked: T) -> str:
    """Returns the refusal by the first rule that applies, as `why: instead`; "" if none applies."""
    for rule in rules:
        if rule.when(asked):
            instead = rule.instead if isinstance(rule.instead, str) else rule.instead(asked)
            return f"{rule.why(asked)}: {instead}" if instead else rule.why(asked)
    return ""
