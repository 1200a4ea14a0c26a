"""Checks of traffic: bytes against the strategy's formula, the saved adapter against plain peft."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from corolla.commands.check.findings import Finding, Proof
from corolla.commands.check.probe import Probe, Round
from corolla.models.files import adapter_files
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import run_round
from corolla.server.rounds.tasks import priced
from corolla.types import Cost, Payload

LOGITS = 1e-5
"""Largest difference of logits between the server's model and the reloaded adapter."""


def proofs(probe: Probe, done: Sequence[Round]) -> Iterator[Proof]:
    """All that must hold of what is sent and saved."""
    yield "bytes up = formula", lambda: _bytes_up(probe, done[-1])
    yield "bytes down = formula", lambda: _bytes_down(probe, done)
    yield "bytes at first = formula", lambda: _bytes_at_first(probe, done[0])
    yield "saved and reloaded", lambda: _reloaded(probe, done[-1].result.state)


def _bytes_up(probe: Probe, last: Round) -> Finding:
    """Bytes that clients have sent equal the paper's formula."""
    costs = _costs(probe, last.state, last.sent, last.number)
    most = sum(map(_dense_bytes, last.observed.updates.values()))
    measured = last.result.traffic.up
    return _as_formula(("bytes up = formula", probe), measured, costs, [c.up for c in costs], most)


def _bytes_down(probe: Probe, done: Sequence[Round]) -> Finding:
    """Bytes that clients receive in a second round equal it, too: all hold what is cached."""
    first, then = done[0], done[min(1, len(done) - 1)]
    folder = Path(shutil.copytree(then.kept, probe.folder / "second"))
    network = probe.network_on(folder, probe.model)
    members = dict.fromkeys(first.result.num_examples, 1)
    state, held = first.result.state, first.result.held
    call = RoundCall(probe.federation, state, held, 2, cohort=members)
    result = run_round(call, network)
    costs = _costs(probe, state, members, 2)
    formula = [cost.down for cost in costs]
    sent = probe.strategy.broadcast(state)
    rows = {str(number): row for number, row in enumerate((sent.log or ())[-1:])}
    one = sum(_dense_bytes(groups) for groups in (sent.payload, sent.cached, rows))
    most = len(members) * (one + sum(map(_dense_bytes, first.observed.updates.values())))
    measured = result.traffic.down
    return _as_formula(("bytes down = formula", probe), measured, costs, formula, most)


def _bytes_at_first(probe: Probe, first: Round) -> Finding:
    """Checks that bytes down in the first round fit the formula, with what is sent once."""
    costs = _costs(probe, first.state, first.sent, 1)
    formula = sum(cost.down + cost.once for cost in costs)
    measured = first.result.traffic.down
    off = measured - formula
    if any(cost.once for cost in costs):
        off = abs(off)
    note = f"{measured} bytes, by the formula {formula}" if off > 0 else ""
    return Finding("bytes at first = formula", probe.kind, float(max(0, off)), 0.0, note)


def _costs(probe: Probe, state: Payload, clients: Iterable[str], round: int) -> Sequence[Cost]:
    federation = probe.federation.at(state)
    return priced(probe.strategy, state, [federation.size(client, round) for client in clients])


def _as_formula(
    what: tuple[str, Probe], measured: int, costs: Sequence[Cost], parts: Sequence[int], most: int
) -> Finding:
    """Bytes against the parts of a formula; one that is a limit says no more than `most`."""
    check, probe = what
    formula = sum(parts)
    off, note = abs(measured - formula), f"{measured} bytes, by the formula {formula}"
    if any(cost.at_most for cost in costs):
        off = max(0, measured - formula)
        if not off and formula > most:
            off, note = formula - most, f"at most {formula} bytes, where all values have {most}"
    return Finding(check, probe.kind, float(off), 0.0, note if off else "")


def _dense_bytes(payload: Payload) -> int:
    return sum(t.numel() * t.element_size() for own in payload.values() for t in own.values())


def _reloaded(probe: Probe, state: Payload) -> Finding:
    """The saved adapter, loaded by plain peft, gives the server's logits."""
    model: Any = probe.model  # of the main probe, an adapter
    adapter = probe.strategy.adapter(state)
    folder = probe.folder / "adapter"
    model.save(folder, adapter, probe.config.lora)
    model.show(adapter, probe.config.lora)
    ids = torch.arange(3, 3 + 24).reshape(2, 12)
    with torch.no_grad():
        ours = model.model(input_ids=ids).logits
        theirs = adapter_files.load_adapter(model.detach(), folder)(input_ids=ids).logits
    return Finding("saved and reloaded", probe.kind, float((ours - theirs).abs().max()), LOGITS)
