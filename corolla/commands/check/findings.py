"""The findings of a check of a strategy, for people and for --json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One proof on one model: what was measured, and the largest value that passes.

    `options` are those that were away from their defaults.
    """

    check: str
    model: str
    measured: float
    limit: float
    note: str = ""
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.measured <= self.limit


Proof = tuple[str, Callable[[], Finding]]
"""The name of a check, and what makes it."""


def made(proof: Proof, model: str) -> Finding:
    """The finding of a proof; whatever a strategy raises meanwhile is its failure."""
    name, make = proof
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - whatever a strategy raises is its failure
        return Finding(name, model, 1.0, 0.0, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Result:
    """All findings of one strategy, and what it took to find them.

    `options` are those that were asked for.
    """

    strategy: str
    aggregates: str
    findings: Sequence[Finding] = field(default_factory=list)
    claims: bool = True
    """True where what the strategy aggregates was checked."""
    options: Mapping[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True where there are findings and all passed."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, for --json; what was measured is null where it is no number."""
        found = [
            {
                **asdict(finding),
                "measured": finding.measured if math.isfinite(finding.measured) else None,
                "passed": finding.passed,
            }
            for finding in self.findings
        ]
        return {**asdict(self), "passed": self.passed, "findings": found}


@dataclass
class Worst:
    """The largest of many errors, and what it was found with. NaN is larger than any number."""

    measured: float = 0.0
    note: str = ""

    def see(self, measured: float, note: str) -> None:
        """Note an error that is larger than those before."""
        if not measured <= self.measured and self.measured == self.measured:
            self.measured, self.note = measured, note

    def finding(self, check: str, model: str, limit: float) -> Finding:
        """The note tells where it was, if it is too large."""
        found = Finding(check, model, self.measured, limit, self.note)
        return found if not found.passed else Finding(check, model, self.measured, limit)
