"""`corolla check`: proofs on effective model weights that a strategy does what it declares.

Every strategy runs rounds on tiny models of each kind, with mixed ranks and alphas where it takes
them, and with rank stabilisation; each proof compares what became of them with what it says. Then
one option after the other is moved away from its default and all is proven again on one model.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from corolla.commands.check import (
    folds,
    local,
    magnitudes,
    options,
    oracle,
    ranks,
    secure_sums,
    sparse_sets,
    tiny_models,
    traffic,
)
from corolla.commands.check.findings import Finding, Proof, Result, made
from corolla.commands.check.probe import Probe, Round, settings
from corolla.commands.check.tables import BRIEFLY, CLASSES, REGROUPED, ROUNDS, START, Trial
from corolla.config.asked import takes_parts
from corolla.config.build import build_strategy
from corolla.errors import ConfigError
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import run_round
from corolla.server.rounds.tasks import costs
from corolla.strategies import offset
from corolla.strategies.listing import registry
from corolla.tensors import tree

OPTIONS_ON = "bert"
"""The model that options are tried on: it has a head beside its adapter."""

_EFFECT = "option has an effect"
_PARTS = "blocks by class"
_BESIDE = "start beside the base"


def conform(
    names: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    rounds: int = len(ROUNDS),
    models: Sequence[str] | None = None,
    given: Mapping[str, Mapping[str, object]] | None = None,
    tried: Sequence[str] | None = None,
) -> list[Result]:
    """Check strategies by name or module:Class, on all probe models or those named.

    `given` holds options, by strategy, that are away from their defaults in all that is run;
    `tried` names the options that are moved away from theirs one at a time (None: all). Raises
    ConfigError for an unknown strategy. A strategy that raises fails; it does not stop the others.
    """
    for name in names:
        registry.find(name)
    checks = [
        _Check(name, say, rounds, models or tiny_models.KINDS, (given or {}).get(name, {}), tried)
        for name in names
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would mostly wait for each other on models as small
    try:
        with torch.random.fork_rng(devices=[]):
            return [check.result() for check in checks]
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Check:
    """The check of one strategy."""

    name: str
    say: Callable[[str], None]
    rounds: int
    models: Sequence[str]
    fixed: Mapping[str, object]
    tried: Sequence[str] | None
    done: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(model, options) → the digest of each round that was run with them."""

    def result(self) -> Result:
        """All findings, and the time that they took."""
        findings: list[Finding] = []
        wall, cpu = time.perf_counter(), time.process_time()
        for kind in self.models:
            self.say(f"{self.name} on {kind}")
            findings += self._proven(kind, self.fixed)
        findings += self._tried()
        cls = registry.find(self.name)
        claims = oracle.claim_of(registry.create(self.name, self.fixed)) != "nothing"
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        return Result(self.name, cls.aggregates, findings, claims, dict(self.fixed), *seconds)

    def _proven(
        self, kind: str, given: Mapping[str, object], trial: Trial | None = None
    ) -> Iterator[Finding]:
        """All proofs with these options; briefly where they are those of a trial."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                probe = Probe(self.name, kind, Path(scratch), given)
                done = list(probe.rounds(trial.rounds if trial else self.rounds))
                self.done[_key(kind, given)] = [_digest(round) for round in done]
                more = () if trial else (*ranks.proofs(probe), *_of_parts(probe), *_of_start(probe))
                for proof in itertools.chain(_proofs(probe, done, trial is not None), more):
                    yield replace(made(proof, kind), options=given)
        except Exception as error:  # noqa: BLE001 - whatever a strategy raises is its failure
            yield _raised(kind, error, given)

    def _tried(self) -> Iterator[Finding]:
        """All proofs with one option after the other away from its default."""
        kind = OPTIONS_ON if OPTIONS_ON in self.models else self.models[0]
        for option in options.names(self.name, self.fixed):
            if self.tried is not None and option not in self.tried:
                continue
            try:
                trials = options.trials(self.name, option, self.fixed)
            except ConfigError as error:
                note = f"{option}: {error}"
                yield Finding(_EFFECT, kind, 1.0, 0.0, note, {**self.fixed, option: "?"})
                continue
            for trial in trials:
                self.say(f"{self.name} on {kind} with {option}={trial.value}")
                yield from self._on_trial(kind, option, trial)

    def _on_trial(self, kind: str, option: str, trial: Trial) -> Iterator[Finding]:
        """All proofs with an option at another value, and that it has an effect."""
        usual, given = {**self.fixed, **trial.beside}, {**self.fixed, **trial.beside}
        given[option] = trial.value
        if len(self.done.get(_key(kind, usual), [])) < trial.rounds:
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    probe = Probe(self.name, kind, Path(scratch), usual)
                    self.done[_key(kind, usual)] = list(map(_digest, probe.rounds(trial.rounds)))
            except Exception as error:  # noqa: BLE001 - whatever a strategy raises is its failure
                yield _raised(kind, error, given)
                return
        yield from self._proven(kind, given, trial)
        if found := self.done.get(_key(kind, given)):
            same = found == self.done[_key(kind, usual)][: len(found)]
            note = f"{option}={trial.value} changes nothing" if same else ""
            yield Finding(_EFFECT, kind, float(same), 0.0, note, given)


def _proofs(probe: Probe, done: Sequence[Round], briefly: bool) -> Iterator[Proof]:
    """All that rounds that were run are held against."""
    claim = oracle.claim_of(probe.strategy)
    yield oracle.CLAIMS[claim], lambda: _as_declared(probe, done)
    yield from local.proofs(probe, done, briefly)
    yield from folds.proofs(folds.Fold(probe, done, REGROUPED[-1:] if briefly else REGROUPED))
    if claim in ("weights", "factors"):
        yield "one client", lambda: _one_client(probe)
    yield from traffic.proofs(probe, done)


def _as_declared(probe: Probe, done: Sequence[Round]) -> Finding:
    """Each round leads to what the clients' models say."""
    seen = [round.observed for round in done]
    errors = [
        oracle.errors(probe, round.result.state, seen[: number + 1], round.deltas)
        for number, round in enumerate(done)
    ]
    return oracle.as_declared(probe, errors)


def _of_parts(probe: Probe) -> Iterator[Proof]:
    """Where clients of a class may train some blocks alone, or all a sparse set or magnitudes."""
    if takes_parts(probe.strategy) and probe.kind == OPTIONS_ON:
        yield _PARTS, lambda: _in_parts(probe)
    if probe.kind == OPTIONS_ON:
        yield from sparse_sets.proofs(probe)
        yield from magnitudes.proofs(probe)
        yield from secure_sums.proofs(probe)


def _in_parts(probe: Probe) -> Finding:
    changes: dict[str, object] = {"classes": CLASSES}
    if registry.traits(probe.strategy).partial == "sent":  # which is for clients of one rank
        changes |= {"ranks": [], "alphas": []}
    with tempfile.TemporaryDirectory() as folder:
        own = Probe(probe.name, probe.kind, Path(folder), probe.options, changes)
        return replace(_as_declared(own, list(own.rounds(BRIEFLY))), check=_PARTS)


def _of_start(probe: Probe) -> Iterator[Proof]:
    """The same holds where the start takes a part out of the base, if the strategy allows that."""
    if probe.kind != OPTIONS_ON:
        return
    try:
        build_strategy(settings(probe.name, probe.kind, probe.options, changes=START))
    except ConfigError:
        return
    yield _BESIDE, lambda: _beside(probe)


def _beside(probe: Probe) -> Finding:
    """The claim, a block that never changes, and the bytes of who gets it for the first time."""
    with tempfile.TemporaryDirectory() as folder:
        own = Probe(probe.name, probe.kind, Path(folder), probe.options, START)
        done = list(own.rounds(BRIEFLY))
        found = replace(_as_declared(own, done), check=_BESIDE)
        block = done[0].state[offset.GROUP]
        if any(tree.digest(r.result.state[offset.GROUP]) != tree.digest(block) for r in done):
            return replace(found, measured=math.inf, note="the block beside the base has changed")
        paid = costs(own.federation, done[0].state, 1, dict.fromkeys(done[0].sent, 1))
        formula, measured = sum(c.down + c.once for c in paid), done[0].result.traffic.down
        # As for bytes at first: what comes each round may not be there yet, what comes once is.
        own_bytes = 4 * tree.count(block)
        least = formula if any(c.once > own_bytes for c in paid) else len(paid) * own_bytes
        if not least <= measured <= formula:
            note = f"{measured} bytes at first, by the formula {formula}"
            return replace(found, measured=math.inf, note=note)
        return found


def _one_client(probe: Probe) -> Finding:
    """With a cohort of one, the global model is that client's model."""
    client = ROUNDS[0][0]
    call = RoundCall(probe.federation, probe.fresh(), {}, 1, cohort={client: 1})
    result = run_round(call, probe.network)
    error = oracle.relative(probe.deltas(result.state), probe.network.deltas[client])
    return Finding("one client", probe.kind, error, oracle.limit_of(probe.strategy))


def _raised(kind: str, error: Exception, given: Mapping[str, object]) -> Finding:
    return Finding("runs", kind, 1.0, 0.0, f"{type(error).__name__}: {error}", given)


def _key(kind: str, given: Mapping[str, object]) -> tuple[str, str]:
    return kind, repr(sorted(given.items()))


def _digest(round: Round) -> str:
    """Returns a digest of what clients sent and kept in a round, and the server made."""
    payloads = [round.result.state, *round.observed.updates.values(), *round.left.values()]
    parts = [tree.digest_all(payload) for payload in payloads]
    parts.append(repr((round.result.traffic.up, round.result.traffic.down, round.result.cost)))
    return " ".join(parts)
