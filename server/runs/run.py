"""A whole run: rounds, checkpoints, evaluation, and the artefacts a user keeps."""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from corolla import seeds
from corolla.artefacts import records
from corolla.artefacts.card import write_brief_card, write_cards
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import ArtefactError, ConfigError, RoundError, StoppedError
from corolla.evaluation.other_process import OtherProcess
from corolla.host import logs
from corolla.host.heap import peak_rss
from corolla.host.processes import uninterrupted
from corolla.interfaces import Strategy
from corolla.models.sparse import carried
from corolla.privacy.guarantee import Unit
from corolla.selection import exchange
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.cohort import read_trace
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import evaluate_clients
from corolla.server.rounds.spending import Spending
from corolla.server.runs import beginning, checkpoint
from corolla.server.runs.account import open_account
from corolla.server.runs.attempts import Attempts, Done, how_to_go_on
from corolla.server.runs.checkpoint import Checkpoint
from corolla.server.runs.ending import ended
from corolla.server.runs.evaluate import Evaluator, Sample
from corolla.server.runs.folder import committed_lines, refuse_other_inputs, write_info, write_lines
from corolla.server.runs.info import privacy_budget, privacy_info, run_info
from corolla.server.runs.journal import Journal, Past, fail_point
from corolla.server.runs.metrics_line import metrics_line
from corolla.server.runs.observer import Observer
from corolla.server.runs.proof import save
from corolla.server.runs.report import write_report
from corolla.server.runs.summary import Summary
from corolla.storage import folders
from corolla.strategies.listing.registry import traits
from corolla.tensors import tree
from corolla.types import Adapter, Metrics, Payload
from corolla.warnings.outcome import of_extension, outcome

_log = logs.logger("run")


@dataclass
class Course:
    """How far a run has come; each committed round moves it on."""

    federation: Federation
    account: Spending
    at: Checkpoint
    lines: list[dict[str, Any]]
    """Those of metrics.jsonl."""
    info: dict[str, Any]
    """The object that run.json holds."""
    base: Mapping[str, Any]
    """The scores and answers of the untouched model."""


@dataclass
class Run:
    """One run and its folder. `facts` holds the hashes of model and data."""

    config: RunConfig
    strategy: Strategy
    network: Network
    evaluator: Evaluator
    folder: Path
    facts: Mapping[str, Any]
    observer: Observer
    keep_updates: bool = False
    resume: bool = False
    own_devices: bool = False
    """Clients are devices of other people, which come and go; see Federation.own_devices."""

    def execute(self) -> Summary:
        """Run all rounds (from the last committed one with `resume`), save, verify, report.

        Raises StoppedError after Ctrl-C, and when too few are online for too long; RoundError,
        ArtefactError and what the network raises. The last checkpoint stays.
        """
        if self.resume:
            refuse_other_inputs(self.folder, self.config, self.facts)
        with Journal(self.folder) as journal:
            if journal.note:
                self.observer.warned(journal.note)
            try:
                return self._execute(journal)
            except (KeyboardInterrupt, StoppedError) as stop:
                why = f"{str(stop) or 'stopped'}{how_to_go_on(self.folder)}"
                _say_last(journal, "stopped", why)
                raise StoppedError(why) from None
            except Exception as error:
                _say_last(journal, "failed", f"{type(error).__name__}: {error}")
                raise

    def _execute(self, journal: Journal) -> Summary:
        began = time.monotonic()
        course = self._start(journal)
        why = self._loop(course, journal)
        course.info |= {"ended": why, **privacy_info(course.account)}
        summary = self._finish(course, time.monotonic() - began)
        if course.account.level:
            checkpoint.prune(self.folder / "checkpoint", 1)  # older ones remember noise
        journal.append("done", why=why)
        _log.info("done", why=why)
        return summary

    def _start(self, journal: Journal) -> Course:
        """Everything before the first round: checked, in the journal and in run.json."""
        federation = self._federation(journal.past)
        unit: Unit = "user" if self.facts.get("per_user") else "example"
        account = open_account(federation, journal.past, unit)
        committed = journal.past.committed
        found = checkpoint.load(self.folder / "checkpoint", committed) if self.resume else None
        model, seed = self.evaluator.model, self.config.seed
        start = model.init(self.config.lora, seeds.derive(seed, "init"))
        untouched = federation.strategy.init(start, seed)
        federation = replace(federation, origin=seedlog.origin(model.base.fingerprint, untouched))
        at = found or beginning.checkpoint(federation, self.evaluator, start)
        untouched = {**untouched, **carried.apart(at.state)[1]}
        carried.hold(model, at.state)
        if not at.round and (why := account.ended(federation, 1)):
            raise ConfigError(f"{why}: no round can be run, start a new one with other settings")
        journal.append(
            "resumed" if self.resume else "started",
            run=federation.run_id,
            rounds=self.config.rounds,
            round=at.round,
            state=at.sha256,
            roster=dict(federation.clients),
            seats=dict(federation.seats),
            **privacy_budget(self.config, account.unit),
        )
        facts = {**self.facts, **carried.facts(at.state)}
        info = run_info(facts, federation, self.evaluator, account, self.keep_updates)
        info["warnings"] += of_extension(self.config, journal.past.rounds)
        base = self._base(federation, untouched)
        write_info(self.folder, {**info, "base": base["metrics"], "status": "running"})
        self.observer.started({**info, "base": base["metrics"]}, at.round + 1)
        if self.keep_updates:
            self._keep_global(federation, at.state, at.round)
        return Course(federation, account, at, committed_lines(self.folder, at.round), info, base)

    def _loop(self, course: Course, journal: Journal) -> str:
        """Round after round, each committed, until there is a reason to end: the reason."""
        account, why = course.account, self._ended(course, journal)
        while not why:
            try:
                course.federation, course.at, line = self._round(
                    course.federation, course.at, journal, account
                )
            except RoundError:
                why = account.ended(course.federation, course.at.round + 1)
                if not course.lines or not why:
                    raise
                break  # its attempts have spent what was left
            course.lines.append(line)
            if why := self._ended(course, journal):
                course.at = _public(course.at, account)
            with uninterrupted():
                self._commit(course.at, course.lines, journal)
            self.observer.round_ended(line)
            _log.info(
                "committed", round=course.at.round, seconds=line["seconds"], loss=line["eval_loss"]
            )
        if (public := _public(course.at, account)) is not course.at:  # no round was the last one
            self._commit(public, course.lines, journal)
        return why

    def _ended(self, course: Course, journal: Journal) -> str:
        """Why no further round is due; "" while one is."""
        why = ended(self.config, course.base["metrics"]["loss"], course.lines, journal.seconds)
        return why or course.account.ended(course.federation, course.at.round + 1)

    def _federation(self, past: Past) -> Federation:
        """Returns the federation with its members, also those that the journal knows.

        Raises ConfigError where no member can take part.
        """
        # Who is known keeps its place; who is not there now may come back.
        clients = {**past.roster, **dict(sorted(self.network.clients().items()))}
        if not clients:
            raise ConfigError("no client answered: nothing to train")
        trace = read_trace(Path(own)) if (own := self.config.availability) else None
        model = self.evaluator.model
        for spec in self.config.loras:
            model.check_rank(spec)
        federation = Federation(
            str(self.facts.get("run_id") or secrets.token_hex(16)),
            self.config,
            self.strategy,
            clients,
            cache(lambda spec: model.init(spec, 0)),
            trace=trace,
            seats={**past.seats, **self.network.seats()},
            roster=tuple(clients),
            own_devices=self.own_devices,
            model_sha256=str(self.facts.get("model_sha256", "")) if self.own_devices else "",
            labels=self.evaluator.labels,
        )
        _refuse_cohort(federation)
        return federation

    def _round(
        self, federation: Federation, at: Checkpoint, journal: Journal, account: Spending
    ) -> tuple[Federation, Checkpoint, dict[str, Any]]:
        """The round after `at`, and its line; the federation may have got new members."""
        attempts = Attempts(self.network, self.observer, journal, self.own_devices, account)
        done = _regrown(attempts.round(federation, at), at.round + 1, self.evaluator)
        fail_point("aggregated", at.round + 1)
        result = done.result
        after = Checkpoint(
            federation.run_id, at.round + 1, result.state, result.held, result.memory
        )
        return done.federation, after, self._measure(after.round, done, account)

    def _measure(self, round: int, done: Done, account: Spending) -> dict[str, Any]:
        """The line of metrics.jsonl of a round, with an evaluation if one is due."""
        federation, result = done.federation, done.result
        if self.keep_updates:
            self._keep_global(federation, result.state, round)
            if not self.own_devices:  # whose updates nobody wrote down
                folder = folders.round_folder(self.folder / "updates", round)
                records.write_weights(folder, result.num_examples)
        scores: Metrics = {}
        if round % self.config.eval_every == 0 or round == self.config.rounds:
            scores = self.evaluator.score(federation.strategy.adapter(result.state))
            if traits(federation.strategy).personal:
                own = evaluate_clients(
                    RoundCall(federation, result.state, result.held, round), self.network
                )
                scores = {**scores, **_of_personal(own)}
        return metrics_line(round, done, scores, account)

    def _commit(self, at: Checkpoint, lines: Sequence[Mapping[str, Any]], journal: Journal) -> None:
        """Metrics and checkpoint, then the line in the journal that makes them count."""
        try:
            write_lines(self.folder, lines)
            sha256 = checkpoint.save(self.folder / "checkpoint", at)
        except OSError as error:
            raise ArtefactError(
                f"round {at.round} could not be kept in {self.folder}: {error.strerror}; the "
                f"round before is, go on with --resume"
            ) from error
        fail_point("checkpointed", at.round)
        journal.append("committed", round=at.round, state=sha256)
        fail_point("committed", at.round)

    def _base(self, federation: Federation, state: Payload) -> dict[str, Any]:
        """Scores and answers of the untouched model: `state` is one of a zero update."""
        adapter = federation.strategy.adapter(state)
        metrics = self.evaluator.examine(adapter)
        clients = evaluate_clients(RoundCall(federation, state, {}, 0), self.network)
        found = {"metrics": metrics, "samples": self._samples(adapter), "clients": clients}
        return {**found, **({"adapter": adapter} if self.config.drift else {})}

    def _samples(self, adapter: Adapter) -> Sequence[Sample]:
        """Held-out rows, answered; none with dp=client, for they are those of clients."""
        return [] if self.config.dp == "client" else self.evaluator.samples(adapter)

    def _finish(self, course: Course, seconds: float) -> Summary:
        """Measure and save the last model, verified, and write run.json and the report."""
        federation, at, info, base = course.federation, course.at, course.info, course.base
        adapter = federation.strategy.adapter(at.state)
        with OtherProcess() as other:  # it imports its libraries while this one measures
            final = self.evaluator.examine(adapter)
            clients = evaluate_clients(
                RoundCall(federation, at.state, at.held, self.config.rounds + 1), self.network
            )
            after = self._samples(adapter)
            if self.config.drift:
                info["drift"] = self.evaluator.drift(base["adapter"], adapter)
            peak = peak_rss()
            artefact, proof, smaller = save(self.evaluator, adapter, self.folder, other, final)
        summary = Summary(
            folder=self.folder,
            artefact=artefact,
            base=base["metrics"],
            final=final,
            lines=course.lines,
            seconds=seconds,
            peak_rss=peak,
            adapter_hash=self.evaluator.model.digest(artefact),
            state_hash=tree.digest_all(at.state),
            proof=proof,
            served=smaller,
            before=base["samples"],
            after=after,
            clients={
                c: {"base": base["clients"].get(c, {}), "final": m} for c, m in clients.items()
            },
            personal=info["personal"],
            privacy=info.get("privacy", {}).get("line", ""),
            answers=not self.evaluator.labels,
        )
        info |= carried.facts(at.state)
        info |= summary.to_json(samples=self.config.dp != "client")
        info["warnings"] += [w.to_json() for w in outcome(self.config, info, course.lines)]
        write_cards(self.folder, info)
        write_info(self.folder, info)
        write_report(self.folder / "report.html", info, course.lines)
        return replace(summary, warnings=info["warnings"])

    def _keep_global(self, federation: Federation, state: Payload, round: int) -> None:
        folder = folders.round_folder(self.folder / "global", round)
        self.evaluator.model.save(folder, federation.strategy.adapter(state), self.config.lora)
        what = f"The global model after round {round} of {self.config.rounds}."
        write_brief_card(folder, what, self.config.model)


def _regrown(done: Done, round: int, evaluator: Evaluator) -> Done:
    """A round with other places of a sparse set, where they are exchanged after it."""
    config, result = evaluator.config, done.result
    if not exchange.due(config, round):
        return done
    labels = evaluator.labels
    state = exchange.exchanged(evaluator.model, config, result.state, round, labels)
    return replace(done, result=replace(result, state=state))


def _refuse_cohort(federation: Federation) -> None:
    """Raises ConfigError for a cohort or a buffer that is never full."""
    config, there = federation.config, federation.population
    if (config.cohort or 0) > there and not federation.own_devices:  # of those, others may join
        raise ConfigError(
            f"cohort {config.cohort} is larger than the {there} clients with enough examples: "
            f"lower --cohort"
        )
    if (config.buffer or 0) > federation.cohort_size:
        raise ConfigError(
            f"buffer {config.buffer} is larger than the cohort of {federation.cohort_size} "
            f"clients: it would never be full"
        )


def _public(at: Checkpoint, account: Spending) -> Checkpoint:
    """The checkpoint without what takes noise off; the same one where it has nothing such."""
    memory = account.forgotten(at.memory)
    return replace(at, memory=memory) if len(memory) < len(at.memory) else at


def _of_personal(clients: Mapping[str, Metrics]) -> Metrics:
    """The means over clients of the losses on their own held-out examples, and on half of them."""
    found: Metrics = {}
    for name in ("loss", "loss_reported"):
        if known := [m[name] for m in clients.values() if name in m]:
            found = {**found, f"personal_{name}": sum(known) / len(known)}
    return found


def _say_last(journal: Journal, event: Literal["stopped", "failed"], why: str) -> None:
    """The last word, if the disk will still take it."""
    with suppress(ArtefactError):
        journal.append(event, why=why)
    _log.warning(event, why=why)
