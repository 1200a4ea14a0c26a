"""The client half: where training starts, what may leak, and what devices keep."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from corolla.commands.check import oracle
from corolla.commands.check.findings import Finding, Proof, Worst
from corolla.commands.check.probe import STILL, Probe, Recorder, Round, settings
from corolla.commands.check.tables import BATCH, CLIENTS, STEPS
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Held
from corolla.server.rounds.round import evaluate_clients, run_round
from corolla.server.rounds.tasks import accepted_only
from corolla.strategies.listing import registry
from corolla.types import Payload


def proofs(probe: Probe, rounds: Sequence[Round], briefly: bool = False) -> Iterator[Proof]:
    """All that must hold of the client half; `probe` has just run the last round.

    Briefly: without what an option does not change.
    """
    last, traits = rounds[-1], registry.traits(probe.strategy)
    yield "examples counted", lambda: _examples_counted(probe, rounds)
    if not briefly:
        yield "no leak between clients", lambda: _no_leak(probe, last)
    yield "starts from the model", lambda: _starts_from_the_model(probe, last)
    if not traits.personal:
        yield "evaluates the model", lambda: _evaluates_the_model(probe, last)
    if any("directions" in own for u in last.observed.updates.values() for own in u.values()):
        yield "directions of one's own", lambda: _own_directions(probe, rounds)
    if traits.mirrors:
        yield "mirrors what clients keep", lambda: _mirrors(probe, rounds)
    if traits.personal or traits.mirrors:
        yield "what is kept counts", lambda: _keeps(probe, last)
    if traits.personal:
        yield "what is kept stays", lambda: _stays(probe, last)


def _examples_counted(probe: Probe, rounds: Sequence[Round]) -> Finding:
    """Each client says how many distinct examples it trained on: the weight of its update."""
    wrong = [
        f"{client} said {n} of {min(CLIENTS[client], STEPS * BATCH)} in round {round.number}"
        for round in rounds
        for client, n in round.result.num_examples.items()
        if n != min(CLIENTS[client], STEPS * BATCH)
    ]
    return Finding("examples counted", probe.kind, float(len(wrong)), 0.0, ", ".join(wrong[:2]))


def _no_leak(probe: Probe, last: Round) -> Finding:
    """Some clients of the last round again, on another model, in reverse order: the same bytes."""
    network = probe.network_on(_copy(last, "reverse"))
    network.reverse = True
    again = _again(probe, last, network, sorted(last.sent)[::2])
    differ = [client for client, packet in again.sent.items() if last.sent[client] != packet]
    note = f"{', '.join(differ)}: update depends on which client trained before" if differ else ""
    return Finding("no leak between clients", probe.kind, float(len(differ)), 0.0, note)


def _starts_from_the_model(probe: Probe, last: Round) -> Finding:
    """With next to no learning rate, clients end with the server's model.

    What they keep for themselves and what is cut to their rank is left out.
    """
    config = settings(probe.name, probe.kind, probe.options, lr=STILL)
    network = _again(probe, last, probe.network_on(_copy(last, "still"), probe.model, config))
    worst, strategy = Worst(), probe.strategy
    cut = strategy.broadcast(last.state).fitted is not None
    wanted = probe.deltas(last.state)
    for client in network.sent:
        if cut and probe.federation.lora(client) != config.lora:
            continue
        if registry.traits(strategy).personal and strategy.aggregates == "other":
            shared = strategy.adapter(last.state).trained
            own = network.trained[client]
            apart = oracle.relative({n: own[n] for n in shared}, shared)
        else:
            apart = oracle.relative(network.deltas[client], wanted)
        worst.see(apart, f"{client} starts from another model than the server's")
    return worst.finding("starts from the model", probe.kind, oracle.EXACT)


def _evaluates_the_model(probe: Probe, last: Round) -> Finding:
    """Checks that clients evaluate the server's model, but for what is cut to their rank."""
    network = probe.network_on(probe.folder / "evaluates", probe.model)
    state, worst = last.result.state, Worst()
    call = RoundCall(probe.federation, state, {}, last.number + 1)
    scores = evaluate_clients(call, network)
    if not scores:
        worst.see(math.inf, "no client could evaluate the model")
    cut, wanted = probe.strategy.broadcast(state).fitted is not None, probe.deltas(state)
    for client in scores:
        if not cut or probe.federation.lora(client) == probe.config.lora:
            apart = oracle.relative(network.deltas[client], wanted)
            worst.see(apart, f"{client} evaluates another model than the server's")
    return worst.finding("evaluates the model", probe.kind, oracle.EXACT)


def _own_directions(probe: Probe, rounds: Sequence[Round]) -> Finding:
    """No two clients, and no client in two rounds, measure along the same directions."""
    seen: dict[tuple[int, ...], str] = {}
    same = []
    for round in rounds:
        for client, update in round.observed.updates.items():
            for own in update.values():
                if "directions" not in own:
                    continue
                drawn, name = tuple(own["directions"].tolist()), f"{client} in {round.number}"
                if drawn in seen:
                    same.append(f"{name} takes those of {seen[drawn]}")
                seen[drawn] = name
    return Finding(
        "directions of one's own", probe.kind, float(len(same)), 0.0, "; ".join(same[:2])
    )


def _mirrors(probe: Probe, rounds: Sequence[Round]) -> Finding:
    """Checks that each group of the state that clients keep too is their mean, over all clients."""
    kept = {client: own for round in rounds for client, own in round.left.items()}
    state, worst = rounds[-1].result.state, Worst()
    groups = {group for own in kept.values() for group in own} & state.keys()
    for group in sorted(groups):
        mean = {
            n: torch.stack([own[group][n].double() for own in kept.values()]).sum(0) / len(CLIENTS)
            for n in state[group]
        }
        apart = oracle.relative(state[group], mean)
        worst.see(apart, f"{group} is not the mean of what {len(CLIENTS)} clients keep")
    if not groups:
        worst.see(1.0, "nothing that clients keep is in the state")
    return worst.finding("mirrors what clients keep", probe.kind, oracle.EXACT)


def _keeps(probe: Probe, last: Round) -> Finding:
    """Checks that a client that kept something ends the round elsewhere than one that lost it."""
    returned = [client for client in last.sent if last.held.get(client)]
    lost = probe.network_on(_copy(last, "lost"), probe.model)
    _again(probe, replace(last, held={}), lost, returned)
    idle = []
    for client in returned:
        one, other = last.left[client], lost.worker.memory.kept(client, last.number, commit=False)
        if _same(one, other) and lost.sent[client] == last.sent[client]:
            idle.append(client)
    note = f"{', '.join(idle)}: what was kept has no effect" if idle else ""
    return Finding("what is kept counts", probe.kind, float(len(idle)), 0.0, note)


def _stays(probe: Probe, last: Round) -> Finding:
    """Not one tensor that a client keeps for itself is among the bytes that it sends."""
    left = []
    for client, packet in last.sent.items():
        sent = packet.payload + packet.header
        for group, params in last.left[client].items():
            for name, tensor in params.items():
                if bool(tensor.any()) and tensor.contiguous().numpy().tobytes() in sent:
                    left.append(f"{client} sends {group}/{name}")
    note = ", ".join(left[:2])
    return Finding("what is kept stays", probe.kind, float(len(left)), 0.0, note)


def _again(probe: Probe, last: Round, network: Recorder, clients: Sequence[str] = ()) -> Recorder:
    """The last round again, of some of its clients or all, who hold nothing that is cached."""
    federation = replace(probe.federation, config=network.worker.config)
    held: Held = {client: accepted_only(last.held, client) for client in last.held}
    members = dict.fromkeys(clients or last.sent, 1)
    run_round(RoundCall(federation, last.state, held, last.number, cohort=members), network)
    return network


def _copy(last: Round, name: str) -> Path:
    """Copies what devices had kept before the last round to a folder of its own; its path."""
    return Path(shutil.copytree(last.kept, last.kept.parent / name))


def _same(one: Payload, other: Payload) -> bool:
    return all(
        bool((params[n] == other[group][n]).all()) for group, params in one.items() for n in params
    )
