"""The terminal view of a plan."""

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla.commands.plan.plan import CostEstimate, Privacy
from corolla.estimates.footprint import Estimate
from corolla.host.text import human_bytes

_SHOWN = 5
"""Rounds whose epsilon the table tells."""
NO_PRIVACY = (
    "no differential privacy: nothing bounds what updates tell of a client's data (epsilon ∞)"
)


def print_plan(console: Console, estimate: CostEstimate, budget: int | None) -> None:
    """The costs of a run as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    traffic, memory, duration = estimate.traffic, estimate.memory, estimate.duration
    limit = "at most " if traffic.at_most else ""

    def between(pair: tuple[int, int]) -> str:
        return limit + " to ".join(dict.fromkeys(map(human_bytes, pair)))

    config = estimate.config
    once = f"; once {human_bytes(traffic.once)}" if traffic.once else ""
    rows: list[tuple[str, str]] = [
        (
            "model",
            f"{config.model}: {estimate.parameters:,} parameters, {estimate.trained:,} trained",
        ),
        ("clients", f"{estimate.clients}, {estimate.cohort} a round, {config.rounds} rounds"),
        ("sent by a client a round", between(traffic.up)),
        ("received a round", between(traffic.down) + once),
        (
            "sent and received in all",
            f"{limit}{human_bytes(traffic.total_up)} and {human_bytes(traffic.total_down)}",
        ),
        ("peak memory of a client", _memory(memory.client)),
        ("peak memory of the server", _memory(memory.server)),
        ("peak memory of a simulation", _memory(memory.simulation)),
    ]
    rows[1:1] = _chosen(estimate)
    if memory.choice and budget is not None:
        changes = ", ".join(f"{k}={v}" for k, v in memory.choice.overrides.items())
        how = f"with {changes}: {_memory(memory.choice.estimate)}" if changes else "as configured"
        rows.append((f"within {human_bytes(budget)}", how))
    rows += [
        (
            "time of a client a round",
            f"about {_time(duration.client)}, estimated from {duration.flops / 1e9:.0f} GFLOP/s "
            f"measured here",
        ),
        ("time of a simulated round", f"about {_time(duration.round)}, estimated"),
        ("privacy", estimate.privacy.end.line() if estimate.privacy else NO_PRIVACY),
    ]
    if estimate.secure:
        rows.append(("secure sums", estimate.secure.line()))
    if estimate.privacy:
        rows += _promised(estimate.privacy)
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table, highlight=False)


def _promised(privacy: Privacy) -> list[tuple[str, str]]:
    """Returns table rows of the epsilon that is spent on the way, and of the noise."""
    shown = list(privacy.after.items())
    shown = shown[:: max(1, math.ceil(len(shown) / _SHOWN))]
    spent = ", ".join(f"{own.epsilon:.3g} after round {number}" for number, own in shown)
    noise = " to ".join(dict.fromkeys(f"{z:.4g}" for z in privacy.noise))
    each = ", by the examples of a client" if privacy.noise[0] < privacy.noise[1] else ""
    return [("epsilon on the way", spent), ("noise multiplier", noise + each)]


def _chosen(estimate: CostEstimate) -> list[tuple[str, str]]:
    """Returns a table row for each choice under the key `budget`."""
    told = estimate.chosen
    found = [("budget", own) for own in [told.get("run")] if own]
    found += [(f"budget of {name}", own) for name, own in told.get("classes", {}).items()]
    public = told.get("given", {}).get("public") or estimate.config.public
    without = "; scores of the public rows will choose others" if public else ""
    return [
        (
            title,
            f"{own['asked']}: {len(own['modules'])} modules, {own['taken'] / own['total']:.3f} of "
            f"what all take{without}",
        )
        for title, own in found
    ]


def _memory(estimate: Estimate) -> str:
    largest = sorted(estimate.terms.items(), key=lambda term: -term[1])[:3]
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in largest)
    return f"{human_bytes(estimate.total)} ({parts}, …)"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
