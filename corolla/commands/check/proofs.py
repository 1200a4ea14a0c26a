"""`corolla check`: proofs on effective model weights that a strategy does what it declares.

Every strategy runs rounds on tiny models of each kind, with mixed ranks and alphas where it takes
them, and with rank stabilisation; each proof compares what became of them with what it says.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from corolla.commands.check import tiny_models
from corolla.commands.check.findings import Finding, Result
from corolla.commands.check.probe import CLIENTS, MOST_BYTES, Probe, Round, shares
from corolla.interfaces import Observed
from corolla.models import adapter_files
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Held
from corolla.server.rounds.round import run_round
from corolla.server.rounds.tasks import accepted_only
from corolla.strategies import registry
from corolla.tensors import factors, tree
from corolla.types import Cost, Params, Payload
from corolla.wire import messages
from corolla.wire.messages import unpack_reply

EXACT = 1e-6
"""Largest relative error of effective weights, in fp32."""
LOGITS = 1e-5
"""Largest difference of logits between the server's model and the reloaded adapter."""


def conform(
    names: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    rounds: int = 3,
    models: Sequence[str] | None = None,
) -> list[Result]:
    """Check strategies by name or module:Class, on all probe models or those named.

    Raises ConfigError for an unknown strategy. A strategy that raises fails; it does not stop
    the others.
    """
    classes = {name: registry.find(name) for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would mostly wait for each other on models as small
    results = []
    try:
        for name, cls in classes.items():
            findings: list[Finding] = []
            for kind in models or tiny_models.KINDS:
                say(f"{name} on {kind}")
                with torch.random.fork_rng(devices=[]):
                    findings += _findings(name, kind, rounds)
            claims = cls.aggregates != "other" or hasattr(cls, "expected")
            results.append(Result(registry.label(name), cls.aggregates, findings, claims))
    finally:
        torch.set_num_threads(threads)
    return results


def _findings(name: str, kind: str, rounds: int) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield from _prove(Probe(name, kind, Path(scratch)), rounds)
    except Exception as error:  # noqa: BLE001 - whatever a strategy raises is its failure
        yield Finding("runs", kind, 1.0, 0.0, f"{type(error).__name__}: {error}")


def _prove(probe: Probe, rounds: int) -> Iterator[Finding]:
    """Run rounds and compare each with what the clients' models say."""
    worst, gap, miscounted = 0.0, 0.0, 0
    observed: list[Observed] = []
    for last in probe.rounds(rounds):
        observed.append(last.observed)
        error, inexact = _errors(probe, last, observed)
        worst, gap = max(worst, error), max(gap, inexact)
        # Three steps of four: every client sees each of its examples at least once.
        miscounted += sum(CLIENTS[c] != n for c, n in last.result.num_examples.items())
    yield _mean_as_declared(probe, worst, gap)
    yield Finding("weights = examples", probe.kind, float(miscounted), 0.0)
    yield _no_leak(probe, last)
    yield from _grouping(probe)
    if probe.strategy.aggregates != "other":
        yield _one_client(probe)
    yield _bytes_up(probe, last)
    yield _bytes_down(probe)
    yield _reloaded(probe, last.result.state)


# --- the mean -------------------------------------------------------------------------------------


def _errors(probe: Probe, last: Round, observed: Sequence[Observed]) -> tuple[float, float]:
    """(error against what the strategy declares, distance from the exact weighted mean)."""
    strategy, network = probe.strategy, probe.network
    p = shares(last.result.num_examples)
    ideal = _weighted_mean({c: network.deltas[c] for c in p}, p)
    reached = probe.deltas(last.result.state)
    gap = _relative(reached, ideal)
    if strategy.aggregates == "other":
        return _error_of_expected(probe, last.result.state, observed), gap
    if strategy.aggregates == "weights":
        return gap, gap
    trained = {c: network.trained[c] for c in p}
    means = _weighted_mean(trained, p)
    scaling = probe.config.lora.scaling
    expected = {m: scaling * factors.product(means, m) for m in factors.modules(means)}
    expected |= {n: t for n, t in ideal.items() if n not in expected}  # the head is a mean itself
    covariance = _covariance(trained, p, means, scaling)
    off = _relative({m: reached[m] + covariance[m] for m in covariance}, ideal)
    return max(_relative(reached, expected), off), gap


def _error_of_expected(probe: Probe, state: Payload, observed: Sequence[Observed]) -> float:
    """How far the global adapter is from what the strategy says to expect; 0 if it says not."""
    expect = getattr(probe.strategy, "expected", None)
    if expect is None:
        return 0.0 if all(tree.finite(params) for params in state.values()) else math.inf
    expected: Params = expect(observed)
    if registry.traits(probe.strategy).personal:
        trained = probe.strategy.adapter(state).trained
        return _relative({n: trained[n] for n in expected}, expected)
    scaling = probe.config.lora.scaling
    dense = {m: scaling * factors.product(expected, m) for m in factors.modules(expected)}
    start = probe.model.init(probe.config.lora, 0)
    heads = factors.select(expected, factors.is_head)
    dense |= {n: t.double() - start[n].double() for n, t in heads.items()}
    reached = probe.deltas(state)
    return _relative({n: reached[n] for n in dense}, dense)


def _covariance(
    trained: Mapping[str, Params], p: Mapping[str, float], means: Params, scaling: float
) -> dict[str, torch.Tensor]:
    """S Σ p_m (B_m - B̄)(A_m - Ā): by which averaging factors misses the mean of products."""
    centred = {c: tree.sub(trained[c], means) for c in p}
    return {
        m: scaling * torch.stack([w * factors.product(centred[c], m) for c, w in p.items()]).sum(0)
        for m in factors.modules(means)
    }


def _mean_as_declared(probe: Probe, worst: float, gap: float) -> Finding:
    """The largest error of all rounds against what the strategy declares to aggregate."""
    limit = EXACT + getattr(probe.strategy, "rounding", 0.0)
    if probe.strategy.aggregates == "weights":
        return Finding("mean of effective weights", probe.kind, worst, limit)
    note = f"{gap:.1%} off the mean of effective weights"
    if probe.strategy.aggregates == "factors":
        note += " = the weighted covariance of A and B"
        return Finding("mean of factors", probe.kind, worst, limit, note)
    if hasattr(probe.strategy, "expected"):
        return Finding("as expected", probe.kind, worst, limit, note)
    note += " (no claim to check)"
    return Finding("aggregate is finite", probe.kind, worst, 0.0, note)


# --- clients and how they are merged --------------------------------------------------------------


def _no_leak(probe: Probe, last: Round) -> Finding:
    """The last round again, on another model, clients in reverse order: the same bytes."""
    again = probe.network_on(last.kept, reverse=True)
    accepted = {client: accepted_only(last.held, client) for client in last.held}
    run_round(RoundCall(probe.federation, last.state, accepted, last.number), again)
    sent = probe.network.sent
    differ = [client for client, packet in sent.items() if again.sent.get(client) != packet]
    note = f"{', '.join(differ)}: update depends on which client trained before" if differ else ""
    return Finding("no leak between clients", probe.kind, float(len(differ)), 0.0, note)


def _grouping(probe: Probe) -> Iterator[Finding]:
    """Merging partial aggregates gives what adding one by one gives, in effective weights."""
    strategy, network = probe.strategy, probe.network
    updates = {
        client: messages.content(unpack_reply(packet, MOST_BYTES))
        for client, packet in network.sent.items()
    }

    def applied(order: Sequence[str]) -> Payload:
        aggregator = strategy.aggregator()
        for client in order:
            aggregator.add(updates[client], network.examples[client])
        return strategy.apply(probe.fresh(), aggregator.finalise())[0]

    flat = applied(list(updates))
    left, right = strategy.aggregator(), strategy.aggregator()
    for index, (client, update) in enumerate(updates.items()):
        (left if index == 0 else right).add(update, network.examples[client])
    left.merge(right)
    merged, _ = strategy.apply(probe.fresh(), left.finalise())
    yield _same("grouping", probe, merged, flat)
    yield _same("order", probe, applied(list(reversed(updates))), flat)


def _same(check: str, probe: Probe, one: Payload, other: Payload) -> Finding:
    """Two states are the same model."""
    return Finding(check, probe.kind, _relative(probe.deltas(one), probe.deltas(other)), EXACT)


def _one_client(probe: Probe) -> Finding:
    """With a cohort of one, the global model is that client's model."""
    alone = probe.config.model_copy(update={"cohort": 1})
    federation = replace(probe.federation, config=alone)
    result = run_round(RoundCall(federation, probe.fresh(), {}, 1), probe.network)
    (client,) = result.num_examples
    error = _relative(probe.deltas(result.state), probe.network.deltas[client])
    limit = EXACT + getattr(probe.strategy, "rounding", 0.0)
    return Finding("one client", probe.kind, error, limit)


# --- bytes and files ------------------------------------------------------------------------------


def _bytes_up(probe: Probe, last: Round) -> Finding:
    """Bytes that clients have sent equal the paper's formula."""
    members = list(last.result.num_examples)
    sizes = [probe.federation.size(client, last.number) for client in members]
    costs = probe.strategy.cost(sizes)
    formula = sum(cost.up for cost in costs)
    return _bytes_as_formula("bytes up = formula", probe, last.result.traffic.up, formula, costs)


def _bytes_down(probe: Probe) -> Finding:
    """Bytes that clients have received, once they hold everything that is cached, equal it, too."""
    everyone = probe.config.model_copy(update={"cohort": len(CLIENTS)})
    federation = replace(probe.federation, config=everyone)
    state: Payload = probe.fresh()
    held: Held = {}
    for number in (1, 2):  # in the second round of full participation everything cached is held
        result = run_round(RoundCall(federation, state, held, number), probe.network)
        state, held = result.state, result.held
    costs = probe.strategy.cost([federation.size(client, 2) for client in result.num_examples])
    formula = sum(cost.down for cost in costs)
    return _bytes_as_formula("bytes down = formula", probe, result.traffic.down, formula, costs)


def _bytes_as_formula(
    check: str, probe: Probe, measured: int, formula: int, costs: Sequence[Cost]
) -> Finding:
    off = abs(measured - formula)
    if any(cost.at_most for cost in costs):
        off = max(0, measured - formula)
    return Finding(check, probe.kind, float(off), 0.0, f"{formula} bytes" if off else "")


def _reloaded(probe: Probe, state: Payload) -> Finding:
    """The saved adapter, loaded by plain peft, gives the server's logits."""
    model, adapter = probe.model, probe.strategy.adapter(state)
    folder = probe.folder / "adapter"
    model.save(folder, adapter, probe.config.lora)
    model.show(adapter, probe.config.lora)
    ids = torch.arange(3, 3 + 24).reshape(2, 12)
    with torch.no_grad():
        ours = model.model(input_ids=ids).logits
        theirs = adapter_files.load_adapter(model.detach(), folder)(input_ids=ids).logits
    return Finding("saved and reloaded", probe.kind, float((ours - theirs).abs().max()), LOGITS)


# --- arithmetic -----------------------------------------------------------------------------------


def _weighted_mean(values: Mapping[str, Params], p: Mapping[str, float]) -> dict[str, torch.Tensor]:
    names = next(iter(values.values()))
    return {n: torch.stack([w * values[c][n].double() for c, w in p.items()]).sum(0) for n in names}


def _relative(found: Params, wanted: Params) -> float:
    """Joint Frobenius norm of the difference over that of `wanted`, over the names of `found`."""
    off = tree.norm({n: found[n].double() - wanted[n].double() for n in found})
    return off / max(tree.norm({n: wanted[n] for n in found}), 1e-30)
