"""Runs inside an audit: on this machine, watched, with nothing left but what they released."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.client.training.worker import Worker
from corolla.commands.simulate.in_process import InProcess
from corolla.config.run import RunConfig
from corolla.host.files import scratch_folder
from corolla.interfaces import Strategy
from corolla.privacy.guarantee import Guarantee
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.spending import Spending
from corolla.server.runs import journal
from corolla.server.runs.checkpoint import Checkpoint
from corolla.server.runs.journal import Journal
from corolla.server.runs.observer import Silent
from corolla.server.runs.run import Course, Run
from corolla.server.runs.setup import Setup
from corolla.storage.memory import Memory
from corolla.types import Payload

ONE_RUN: Mapping[str, Any] = {
    "quorum": 1e-9,  # who is not in does not answer
    "engine": "inprocess",
    "availability": None,
    "max_seconds": None,
    "target_loss": None,
    "patience": None,
}
"""Settings with which nothing but the budget ends a run."""


@dataclass
class Watched(Run):
    """A run that leaves nothing but what it has released: (round, state before, state after)."""

    steps: list[tuple[int, Payload, Payload]] = field(default_factory=list)
    claim: Guarantee | None = None
    """The guarantee that the run itself states."""
    events: Sequence[Mapping[str, Any]] = ()
    base: float = math.nan
    final: float = math.nan

    def _round(
        self, federation: Federation, at: Checkpoint, journal: Journal, account: Spending
    ) -> tuple[Federation, Checkpoint, dict[str, Any]]:
        done = super()._round(federation, at, journal, account)
        self.steps.append((at.round + 1, at.state, done[1].state))
        self.claim = account.guarantee()
        return done

    def _base(self, federation: Federation, state: Payload) -> dict[str, Any]:
        self.base = self._loss(federation, state)
        return {"metrics": {"loss": self.base}, "samples": [], "clients": {}}

    def _finish(self, course: Course, seconds: float) -> Any:
        """No artefact and no report: what counts has been released."""
        self.final = self._loss(course.federation, course.at.state)

    def _loss(self, federation: Federation, state: Payload) -> float:
        return self.evaluator.score(federation.strategy.adapter(state))["loss"]

    @property
    def cohorts(self) -> Mapping[int, Sequence[str]]:
        """Round → the clients that were asked in its last attempt."""
        return {e["round"]: list(e["cohort"]) for e in self.events if e["event"] == "planned"}


def run_with(
    config: RunConfig, strategy: Strategy, network: Network, loaded: Setup, folder: Path
) -> Watched:
    """The whole run, as a simulation's: sampling, gate, noise, budget, journal."""
    folder.mkdir()
    run = Watched(config, strategy, network, loaded.evaluator, folder, loaded.facts, Silent())
    run.execute()
    run.events = journal.read(folder)
    return run


def run_here(config: RunConfig, loaded: Setup) -> Watched:
    """A run whose clients are trained in this process."""
    with scratch_folder("audit") as scratch:
        memory = Memory(scratch / "memory", scratch / "clients")
        worker = Worker(config, loaded.model, loaded.data, memory)
        return run_with(config, loaded.strategy, InProcess(worker), loaded, scratch / "run")
