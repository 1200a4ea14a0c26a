"""The summary of a finished run, for its user and for run.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corolla.artefacts.served import Served
from corolla.server.runs.evaluate import Sample, fairness
from corolla.server.runs.proof import Proof
from corolla.types import Metrics


@dataclass(frozen=True)
class Summary:
    """The summary of a finished run."""

    folder: Path
    artefact: Path
    base: Metrics
    final: Metrics
    lines: Sequence[Mapping[str, Any]]
    """Those of metrics.jsonl."""
    seconds: float
    peak_rss: int
    """Bytes, of training: to reload a whole model may take more."""
    adapter_hash: str
    state_hash: str
    proof: Proof
    """That what is saved is what was trained."""
    served: Served | None
    """The adapter that servers of models take; None where there is no adapter with a rank."""
    before: Sequence[Sample]
    after: Sequence[Sample]
    clients: Mapping[str, Mapping[str, Metrics]]
    personal: bool
    """True where the clients' own models count: the global one is a part of each."""
    privacy: str
    """The promise to each example or client; "" without differential privacy."""
    answers: bool = True
    """True where the model writes answers; a classifier does not."""
    warnings: Sequence[Mapping[str, Any]] = ()
    """All that the run warns of, as run.json has it (see corolla/warnings/outcome.py)."""

    @property
    def rounds(self) -> int:
        """How many were committed."""
        return len(self.lines)

    @property
    def bytes_up(self) -> int:
        """Bytes of payload from all clients in all rounds."""
        return sum(line["bytes_up"] for line in self.lines)

    @property
    def bytes_down(self) -> int:
        """Bytes of payload to all clients in all rounds."""
        return sum(line["bytes_down"] for line in self.lines)

    @property
    def per_client(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((up, its formula), (down, its formula)) in bytes, of a client of the last round."""
        return _per_client(self.lines[-1])

    @property
    def sim_seconds(self) -> float | None:
        """Simulated seconds of all rounds on devices; None where time is not simulated."""
        known = [line["sim_seconds"] for line in self.lines if "sim_seconds" in line]
        return math.fsum(known) if known else None

    @property
    def fairness(self) -> Mapping[str, Metrics]:
        """How evenly clients are served, before and after (evaluate.fairness)."""
        return fairness(self.clients)

    @property
    def rank_errors(self) -> list[float]:
        """The relative error of the cut to `max_rank` in each round; empty without the key."""
        return [line["rank_error"] for line in self.lines if "rank_error" in line]

    def to_json(self, samples: bool) -> dict[str, Any]:
        """Returns the facts that run.json gets when a run is done.

        With `samples` also held-out rows and answers.
        """
        told = {"before": self.before, "after": self.after} if samples else {}
        return {
            "status": "done",
            "base": self.base,
            "final": self.final,
            "seconds": round(self.seconds, 3),
            **({"sim_seconds": total} if (total := self.sim_seconds) is not None else {}),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "peak_rss": self.peak_rss,
            "adapter_sha256": self.adapter_hash,
            "state_sha256": self.state_hash,
            "reload_max_logit_difference": self.proof.difference,
            "reload": self.proof.to_json(),
            **({"served": self.served.to_json(self.final["loss"])} if self.served else {}),
            **({"rank_errors": errors} if (errors := self.rank_errors) else {}),
            "bytes_per_client": self.per_client,
            "clients": self.clients,
            "fairness": self.fairness,
            **({"samples": {k: [asdict(s) for s in v] for k, v in told.items()}} if told else {}),
        }


def _per_client(line: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Means over a round's clients; the formula counts those that answered. 0 where nobody did.

    What is planned for the sake of privacy is of all that are asked.
    """
    asked = max(1, line["clients"] + line.get("dropped", 0))
    valid = max(1, line["clients"]) if "framing_up" in line else asked
    up = (line["bytes_up"] / valid, line["formula_up"] / valid)
    return up, (line["bytes_down"] / asked, line["formula_down"] / valid)
