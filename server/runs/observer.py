"""Observers of a run: a terminal, a tracker, a log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Observer(Protocol):
    """The observer of a run. Must not change anything."""

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        """The run begins at `first_round`; `facts` is what run.json holds."""

    def warned(self, text: str) -> None:
        """Something that does not end the run: a pause, a round that is tried again."""

    def round_started(self, round: int, cohort: int) -> None:
        """A cohort of this size is asked."""

    def replied(self, client: str) -> None:
        """A client of the cohort has answered, or is given up."""

    def round_ended(self, line: Mapping[str, Any]) -> None:
        """The line that metrics.jsonl has got."""


class Silent:
    """An observer that nobody hears."""

    def started(self, facts: Mapping[str, Any], first_round: int) -> None: ...

    def warned(self, text: str) -> None: ...

    def round_started(self, round: int, cohort: int) -> None: ...

    def replied(self, client: str) -> None: ...

    def round_ended(self, line: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Many:
    """Several observers, told one after the other."""

    observers: Sequence[Observer]

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        for observer in self.observers:
            observer.started(facts, first_round)

    def warned(self, text: str) -> None:
        for observer in self.observers:
            observer.warned(text)

    def round_started(self, round: int, cohort: int) -> None:
        for observer in self.observers:
            observer.round_started(round, cohort)

    def replied(self, client: str) -> None:
        for observer in self.observers:
            observer.replied(client)

    def round_ended(self, line: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.round_ended(line)
