"""What a check of a strategy has found, for people and for --json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One proof on one model: what was measured, and the largest value that passes."""

    check: str
    model: str
    measured: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.measured <= self.limit


@dataclass(frozen=True)
class Result:
    """All findings of one strategy."""

    strategy: str
    aggregates: str
    findings: Sequence[Finding] = field(default_factory=list)
    claims: bool = True
    """Whether what it aggregates was checked."""

    @property
    def passed(self) -> bool:
        """Whether there are findings and all passed."""
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, for --json."""
        found = [{**asdict(finding), "passed": finding.passed} for finding in self.findings]
        return {**asdict(self), "passed": self.passed, "findings": found}
