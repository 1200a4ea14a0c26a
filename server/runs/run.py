"""A whole run: rounds, checkpoints, evaluation, and the artefacts a user keeps."""

import json
import math
import platform
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from corolla import seeds
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import ArtefactError, ConfigError, RoundError, StoppedError
from corolla.host import logs
from corolla.host.files import write_atomic
from corolla.host.heap import peak_rss
from corolla.host.processes import uninterrupted
from corolla.interfaces import Strategy
from corolla.models import records
from corolla.privacy.guarantee import NEIGHBOURS
from corolla.server.rounds import spending
from corolla.server.rounds.cohort import read_trace
from corolla.server.rounds.federation import Federation, Held, Network
from corolla.server.rounds.round import RoundResult, evaluate_clients
from corolla.server.rounds.spending import Spending
from corolla.server.runs import checkpoint, gradient_start
from corolla.server.runs.attempts import Attempts, Done, how_to_go_on
from corolla.server.runs.checkpoint import Checkpoint
from corolla.server.runs.ending import ended
from corolla.server.runs.evaluate import Evaluator, Sample, fairness
from corolla.server.runs.journal import Journal, Past, fail_point
from corolla.server.runs.observer import Observer
from corolla.server.runs.report import write_report
from corolla.storage import folders
from corolla.strategies.registry import traits
from corolla.tensors import tree
from corolla.types import Adapter, Aggregates, Metrics, Payload
from corolla.version import __version__

_log = logs.logger("run")


@dataclass(frozen=True)
class Summary:
    """What a finished run has to say."""

    folder: Path
    artefact: Path
    base: Metrics
    final: Metrics
    rounds: int
    seconds: float
    bytes_up: int
    bytes_down: int
    per_client: tuple[tuple[float, float], tuple[float, float]]
    """((up, its formula), (down, its formula)) in bytes, of a client of the last round."""
    peak_rss: int
    adapter_hash: str
    reload_difference: float
    before: Sequence[Sample]
    after: Sequence[Sample]
    clients: Mapping[str, Mapping[str, Metrics]] = field(default_factory=dict)
    personal: bool = False
    """What counts are the clients' own models: the global one is a part of each."""
    sim_seconds: float | None = None
    """Of all rounds on simulated devices; None where time is not simulated."""
    privacy: str = ""
    """What is promised to each example or client; "" without differential privacy."""

    @property
    def fairness(self) -> Mapping[str, Metrics]:
        """How evenly clients are served, before and after (server.evaluate.fairness)."""
        return fairness(self.clients)


@dataclass
class Run:
    """One run and its folder. `facts` holds the hashes of model and data."""

    config: RunConfig
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
            self._same_inputs()
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
        federation = self._federation(journal.past)
        account = spending.begin(federation, journal.past)
        committed = journal.past.committed
        found = checkpoint.load(self.folder / "checkpoint", committed) if self.resume else None
        model, seed = self.evaluator.model, self.config.seed
        start = model.init(self.config.lora, seeds.derive(seed, "init"))
        untouched = initial = federation.strategy.init(start, seed)
        federation = replace(federation, origin=seedlog.origin(model.base.fingerprint, untouched))
        if self.config.start == "gradient" and not found:
            start = gradient_start.adapter(model, start, self.config, self.evaluator.labels)
            initial = federation.strategy.init(start, seed)
        at = found or Checkpoint(federation.run_id, 0, initial, {})
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
            **_budget(self.config),
        )
        lines = _committed(self.folder / "metrics.jsonl", at.round)
        info = self._info(federation, account)
        base = self._base(federation, untouched, info)
        self._write_info({**info, "base": base["metrics"], "status": "running"})
        self.observer.started({**info, "base": base["metrics"]}, at.round + 1)
        if self.keep_updates:
            self._keep_global(federation, at.state, at.round)
        base_loss = base["metrics"]["loss"]

        def over() -> str:
            why = ended(self.config, base_loss, lines, journal.seconds)
            return why or account.ended(federation, at.round + 1)

        why = over()
        while not why:
            try:
                federation, at, line = self._round(federation, at, journal, account)
            except RoundError:
                if not lines or not (why := account.ended(federation, at.round + 1)):
                    raise
                break  # its attempts have spent what was left
            lines.append(line)
            if why := over():
                at = account.forgotten(at)
            with uninterrupted():
                self._commit(at, lines, journal)
            self.observer.round_ended(line)
            _log.info("committed", round=at.round, seconds=line["seconds"], loss=line["eval_loss"])
        if (public := account.forgotten(at)) is not at:  # no round was the last one
            self._commit(public, lines, journal)
        seconds = time.monotonic() - began
        info |= {"ended": why, **_privacy(account)}
        summary = self._finish(federation, at.state, at.held, lines, info, base, seconds)
        if account.level:
            checkpoint.prune(self.folder / "checkpoint", 1)  # older ones remember noise
        journal.append("done", why=why)
        _log.info("done", why=why)
        return summary

    def _federation(self, past: Past) -> Federation:
        strategy = build_strategy(self.config)
        # Who is known keeps its place; who is not there now may come back.
        clients = {**past.roster, **dict(sorted(self.network.clients().items()))}
        if not clients:
            raise ConfigError("no client answered: nothing to train")
        availability = self.config.availability
        trace = read_trace(Path(availability)) if availability else None
        model = self.evaluator.model
        for spec in self.config.loras:
            model.check_rank(spec)
        run_id = self.facts.get("run_id") or secrets.token_hex(16)
        fresh = cache(lambda spec: model.init(spec, 0))
        federation = Federation(
            str(run_id),
            self.config,
            strategy,
            clients,
            fresh,
            trace=trace,
            seats={**past.seats, **self.network.seats()},
            roster=tuple(clients),
            own_devices=self.own_devices,
            model_sha256=str(self.facts.get("model_sha256", "")) if self.own_devices else "",
            labels=self.evaluator.labels,
        )
        cohort, there = self.config.cohort or 0, federation.population
        if cohort > there and not self.own_devices:  # of those, others may join
            raise ConfigError(
                f"cohort {cohort} is larger than the {there} clients with enough examples: lower "
                f"--cohort"
            )
        if (self.config.buffer or 0) > federation.cohort_size:
            raise ConfigError(
                f"buffer {self.config.buffer} is larger than the cohort of "
                f"{federation.cohort_size} clients: it would never be full"
            )
        return federation

    def _round(
        self, federation: Federation, at: Checkpoint, journal: Journal, account: Spending
    ) -> tuple[Federation, Checkpoint, dict[str, Any]]:
        """The round after `at`, and its line; the federation may have got new members."""
        attempts = Attempts(self.network, self.observer, journal, self.own_devices, account)
        done = attempts.round(federation, at)
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
                own = evaluate_clients(federation, result.state, result.held, round, self.network)
                scores = {**scores, "personal_loss": _mean_loss(own)} if own else scores
        return _line(round, done, scores, account)

    def _commit(self, at: Checkpoint, lines: Sequence[Mapping[str, Any]], journal: Journal) -> None:
        """Metrics and checkpoint, then the line in the journal that makes them count."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            write_atomic(self.folder / "metrics.jsonl", text.encode())
            sha256 = checkpoint.save(self.folder / "checkpoint", at)
        except OSError as error:
            raise ArtefactError(
                f"round {at.round} could not be kept in {self.folder}: {error.strerror}; the "
                f"round before is, go on with --resume"
            ) from error
        fail_point("checkpointed", at.round)
        journal.append("committed", round=at.round, state=sha256)
        fail_point("committed", at.round)

    def _base(
        self, federation: Federation, state: Payload, info: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Scores and answers of the untouched model: `state` is one of a zero update."""
        adapter = federation.strategy.adapter(state)
        metrics = self.evaluator.examine(adapter)
        clients = evaluate_clients(federation, state, {}, 0, self.network)
        return {"metrics": metrics, "samples": self._samples(adapter), "clients": clients}

    def _samples(self, adapter: Adapter) -> Sequence[Sample]:
        """Held-out rows, answered; none with dp=client, for they are those of clients."""
        return [] if self.config.dp == "client" else self.evaluator.samples(adapter)

    def _finish(
        self,
        federation: Federation,
        state: Payload,
        held: Held,
        lines: Sequence[Mapping[str, Any]],
        info: dict[str, Any],
        base: Mapping[str, Any],
        seconds: float,
    ) -> Summary:
        adapter = federation.strategy.adapter(state)
        folder = self.folder / self.evaluator.model.artefact
        final = self.evaluator.examine(adapter)
        clients = evaluate_clients(federation, state, held, self.config.rounds + 1, self.network)
        after = self._samples(adapter)
        unproven = folder.with_name(folder.name + ".unproven")
        peak = peak_rss()  # of training: to reload a whole model may take more
        self.evaluator.save(adapter, unproven)
        difference = self.evaluator.verify(adapter, unproven)
        shutil.rmtree(folder, ignore_errors=True)
        unproven.replace(folder)
        summary = Summary(
            folder=self.folder,
            artefact=folder,
            base=base["metrics"],
            final=final,
            rounds=len(lines),
            seconds=seconds,
            bytes_up=sum(line["bytes_up"] for line in lines),
            bytes_down=sum(line["bytes_down"] for line in lines),
            per_client=_per_client(lines[-1]),
            peak_rss=peak,
            adapter_hash=self.evaluator.model.digest(folder),
            reload_difference=difference,
            before=base["samples"],
            after=after,
            clients={
                c: {"base": base["clients"].get(c, {}), "final": m} for c, m in clients.items()
            },
            personal=info["personal"],
            sim_seconds=_sim_seconds(lines),
            privacy=info.get("privacy", {}).get("line", ""),
        )
        outcome = {
            "status": "done",
            "base": summary.base,
            "final": summary.final,
            "seconds": round(seconds, 3),
            **({"sim_seconds": total} if (total := summary.sim_seconds) is not None else {}),
            "bytes_up": summary.bytes_up,
            "bytes_down": summary.bytes_down,
            "peak_rss": summary.peak_rss,
            "adapter_sha256": summary.adapter_hash,
            "state_sha256": tree.digest_all(state),
            "reload_max_logit_difference": difference,
            "bytes_per_client": summary.per_client,
            "clients": summary.clients,
            "fairness": summary.fairness,
        }
        if self.config.dp != "client":
            outcome["samples"] = {
                "before": [asdict(s) for s in summary.before],
                "after": [asdict(s) for s in summary.after],
            }
        self._write_info({**info, **outcome})
        write_report(self.folder / "report.html", {**info, **outcome}, lines)
        return summary

    def _info(self, federation: Federation, account: Spending) -> dict[str, Any]:
        packages = ("flwr", "torch", "peft", "transformers", "safetensors")
        return {
            **self.facts,
            "corolla": __version__,
            "run_id": federation.run_id,
            "keep_updates": self.keep_updates,
            "config": self.config.model_dump(mode="json"),
            "aggregates": self._aggregates(federation.strategy),
            "personal": traits(federation.strategy).personal,
            "num_clients": len(federation.clients),
            "cohort": federation.cohort_size,
            "target_modules": self.evaluator.model.targets,
            "labels": list(self.evaluator.labels),
            "heldout_skipped": self.evaluator.skipped,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "platform": platform.platform(),
            **_privacy(account),
        }

    def _aggregates(self, strategy: Strategy) -> Aggregates:
        """What a run averages: without factors, the trained tensors are the weights themselves."""
        if self.config.robust != "none":
            return "other"
        dense = self.config.parameters != "lora"
        return "weights" if dense and strategy.aggregates == "factors" else strategy.aggregates

    def _same_inputs(self) -> None:
        """Raises ConfigError when the model or the data changed since the run began."""
        before = json.loads((self.folder / "run.json").read_text())
        for what in ("model", "data", "availability"):
            if before.get(f"{what}_sha256") != self.facts.get(f"{what}_sha256"):
                raise ConfigError(
                    f"the {what} ({getattr(self.config, what)}) is not what {self.folder} was "
                    f"begun with: restore it, or start a new run"
                )

    def _write_info(self, info: Mapping[str, Any]) -> None:
        write_atomic(self.folder / "run.json", (json.dumps(info, indent=2) + "\n").encode())

    def _keep_global(self, federation: Federation, state: Payload, round: int) -> None:
        folder = folders.round_folder(self.folder / "global", round)
        self.evaluator.model.save(folder, federation.strategy.adapter(state), self.config.lora)


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make the output folder. Raises ConfigError unless it is new or empty, or resumed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: name a folder")
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not resume:
        raise ConfigError(f"--out {folder} is not empty: add --resume, or name another folder")
    if resume and not (folder / "run.json").is_file():
        raise ConfigError(f"nothing to resume in {folder}: it has no run.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make --out {folder}: {error.strerror}") from error


def stored_run(folder: Path) -> tuple[RunConfig, str, bool]:
    """Config, run id and keep_updates of a run's folder. Raises ArtefactError when damaged."""
    try:
        info = json.loads((folder / "run.json").read_text())
        return validate(info["config"]), str(info["run_id"]), bool(info["keep_updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / 'run.json'} cannot be read: {error!r}") from error


def _committed(path: Path, round: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a committed round."""
    if round == 0 or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [line for line in lines if line["round"] <= round]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error


def _privacy(account: Spending) -> dict[str, Any]:
    """The object of run.json, where there is differential privacy."""
    found = account.to_json()
    return {"privacy": found} if found else {}


def _budget(config: RunConfig) -> dict[str, Any]:
    """What the journal says of differential privacy before anything is spent."""
    if config.dp == "none":
        return {}
    facts = {"unit": config.dp, "neighbours": NEIGHBOURS[config.dp]}
    facts |= {"sampling": config.dp_sampling} if config.dp == "client" else {}
    return {"privacy": {**facts, "delta": config.delta, "budget": config.epsilon}}


def _per_client(line: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Means over a round's clients; the formula counts those that answered. 0 where nobody did.

    What is planned for the sake of privacy is of all that are asked.
    """
    asked = max(1, line["clients"] + line.get("dropped", 0))
    valid = max(1, line["clients"]) if "framing_up" in line else asked
    up = (line["bytes_up"] / valid, line["formula_up"] / valid)
    return up, (line["bytes_down"] / asked, line["formula_down"] / valid)


def _sim_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The simulated seconds of all rounds together."""
    known = [line["sim_seconds"] for line in lines if "sim_seconds" in line]
    return math.fsum(known) if known else None


def _mean_loss(clients: Mapping[str, Metrics]) -> float:
    """The mean over clients of the loss on their own held-out examples."""
    return sum(m["loss"] for m in clients.values()) / len(clients)


def _say_last(journal: Journal, event: Literal["stopped", "failed"], why: str) -> None:
    """The last word, if the disk will still take it."""
    with suppress(ArtefactError):
        journal.append(event, why=why)
    _log.warning(event, why=why)


def _line(round: int, done: Done, scores: Metrics, account: Spending) -> dict[str, Any]:
    result, config, dp = done.result, account.config, account.config.dp
    metrics = dict(result.metrics)
    if dp == "none":
        metrics.pop("epsilon", None)  # whatever a client says: nobody has promised it anything
    line: dict[str, Any] = {
        **metrics,  # first: no name that a client sends may replace one of ours
        "round": round,
        "train_loss": metrics.get("train_loss"),
        "eval_loss": scores.get("loss"),
        "eval_accuracy": scores.get("accuracy"),
        **({"eval_f1": scores["f1"]} if "f1" in scores else {}),
        **({"personal_loss": own} if (own := scores.get("personal_loss")) is not None else {}),
        **(_planned(done, account) if account.level else _counted(result)),
        "formula_up": result.cost.up,
        "formula_down": result.cost.down,
        "seconds": done.seconds,
        "peak_rss": peak_rss(),
        **({"attempt": done.attempt} if done.attempt else {}),
        "sampling_probability": result.sampling_probability,
        "client_loss": dict(result.client_loss),
        **({"delta": config.delta, "withheld": account.withheld} if dp != "none" else {}),
    }
    if result.dropped and dp != "client":
        line["dropped_why"] = dict(result.dropped)
    return line


def _counted(result: RoundResult) -> dict[str, Any]:
    """Who took part in a round, and what that has moved."""
    return {
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "framing_up": result.framing_up,
        "framing_down": result.framing_down,
        **({"sim_seconds": result.sim_seconds} if result.sim_seconds is not None else {}),
        "clients": result.updates,
        "dropped": max(len(result.dropped), result.asked - result.updates),
        "verdicts": Counter(str(verdict.code) for verdict in result.verdicts.values()),
    }


def _planned(done: Done, account: Spending) -> dict[str, Any]:
    """The same as far as no update decides it, and, of a secret cohort, as nobody's presence does.

    `clients` are those that have answered, whatever they sent; bytes are those of the formula.
    """
    result = done.result
    moved = {"bytes_up": result.cost.up, "bytes_down": result.cost.down}
    if account.poisson:
        return {**moved, "clients": done.federation.cohort_size}
    answered = min(result.answered, result.asked)
    return {**moved, "clients": answered, "dropped": result.asked - answered}
