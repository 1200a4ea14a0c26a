"""The terminal view of a run: bars for rounds and clients, tokens per second, a final table."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from corolla.artefacts.sizes import sentence
from corolla.commands.warned import say_warning
from corolla.config import sums
from corolla.config.run import RunConfig
from corolla.data import census
from corolla.evaluation.scoring import SHARES
from corolla.host.text import human_bytes
from corolla.models.experts.reach import Reach
from corolla.server.runs.summary import Summary
from corolla.sums import thresholds
from corolla.warnings.outcome import VERDICTS


class Bars:
    """Progress bars on a terminal; one line a round where the output is a file or a pipe."""

    def __init__(self, console: Console, rounds: int) -> None:
        self.console, self.rounds = console, rounds
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None
        self._busy = TaskID(-1)
        self._tokens, self._since = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        self._busy = self._progress.add_task(
            "loading", total=None, note="and measuring the base model"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        self._progress.remove_task(self._busy)
        config = facts["config"]
        self.console.print(
            f"[bold]{escape(facts['strategy'])}[/] on {escape(config['data'])}: "
            f"{facts['num_clients']} clients, {facts['cohort']} a round, base model "
            f"{escape(config['model'])}, held-out loss {facts['base']['loss']:.4f}",
            soft_wrap=True,
        )
        if facts["clients_left_out"]:
            self.console.print(
                f"[yellow]{facts['clients_left_out']} clients left out:[/] fewer than "
                f"min_examples={config['min_examples']} training examples"
            )
        if without := facts.get("clients_without_target"):
            self.console.print(
                f"[yellow]{len(without)} clients left out:[/] no row has a target within "
                f"max-length={config['max_length']}: {escape(', '.join(without[:5]))}"
                f"{', …' if len(without) > 5 else ''}",
                soft_wrap=True,
            )
        if reached := facts.get("reach"):
            share = escape(Reach(**reached).line)
            self.console.print(f"trains  {share}", soft_wrap=True, highlight=False)
        if read := facts.get("data", {}):
            lengths = read.get("lengths")
            told = [read["container"], *([census.told(lengths)] if lengths else [])]
            self.console.print(f"data  {escape('; '.join(told))}", soft_wrap=True, highlight=False)
        if found := facts.get("privacy"):
            self.console.print(f"privacy  {escape(_noise(found))}", soft_wrap=True, highlight=False)
        if config.get("secure_sum"):
            self.console.print(f"secure sums  {_sums(facts)}", soft_wrap=True, highlight=False)
        for warning in facts["warnings"]:
            self.warned(warning["text"])
        if first_round > 1:
            self.console.print(f"resumed after round {first_round - 1}")
        self._rounds = self._progress.add_task(
            "rounds", total=self.rounds, completed=first_round - 1, note=""
        )
        self._clients = self._progress.add_task("clients", total=facts["cohort"], note="")

    def warned(self, text: str) -> None:
        """Something that does not end the run."""
        say_warning(self.console, text)

    def round_started(self, round: int, cohort: int) -> None:
        self._tokens, self._since = 0, time.monotonic()
        if self._clients is not None:
            self._progress.reset(self._clients, total=cohort, note="")

    def stepped(self, tokens: int) -> None:
        """One local step has read this many tokens."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._since, 1e-9)
        if self._clients is not None:
            self._progress.update(self._clients, note=f"{rate:,.0f} tokens/s")

    def replied(self, client: str) -> None:
        if self._clients is not None:
            self._progress.advance(self._clients)

    def round_ended(self, line: Mapping[str, Any]) -> None:
        if self._rounds is not None:
            self._progress.advance(self._rounds)
        if line["round"] == self.rounds:
            self._progress.add_task("ending", total=None, note="measuring, saving, reloading")
        trained, held = line["train_loss"], line["eval_loss"]
        parts = [
            f"round {line['round']}/{self.rounds}",
            f"training loss {trained:.4f}" if trained is not None else "",
            f"held-out loss {held:.4f}" if held is not None else "",
            f"clients' own {own:.4f}" if (own := line.get("personal_loss")) is not None else "",
            f"up {human_bytes(line['bytes_up'])}, down {human_bytes(line['bytes_down'])}",
            f"{line['seconds']:.1f} s",
            f"simulated {line['sim_seconds']:,.1f} s" if "sim_seconds" in line else "",
            f"epsilon {line['epsilon']:.3g}" if "epsilon" in line else "",
            f"max-rank cut {line['rank_error']:.2%} off" if "rank_error" in line else "",
            _zeros(line),
            f"[yellow]{line['dropped']} dropped[/]" if line.get("dropped") else "",
        ]
        self.console.print(
            "  ".join(part for part in parts if part), highlight=False, soft_wrap=True
        )


def _noise(found: Mapping[str, Any]) -> str:
    """The unit, budget, noise and withheld facts of a private run, as they are planned."""
    z, budget = found["noise_multiplier"], found["budget"]
    noise = f"noise multiplier {z:.4g}" if z else "each client's noise is made for the budget"
    wanted = f"budget epsilon {budget:g}, " if budget is not None else ""
    return (
        f"of each {found['unit']}: {wanted}delta {found['delta']:g}, clip {found['clip']:g}, "
        f"{noise}; not told: {found['withheld']}"
    )


def _sums(facts: Mapping[str, Any]) -> str:
    """The members of a secure sum, and what the server learns at least."""
    config: RunConfig = RunConfig.model_construct(**facts["config"])
    members, corrupt = facts["cohort"], sums.corrupt(config, facts["num_clients"])
    missing = thresholds.most_missing(members, corrupt, config.smallest_sum)
    return thresholds.told(members, corrupt, missing)


def _zeros(line: Mapping[str, Any]) -> str:
    """Returns the advice to raise eps when a perturbation is too small for the loss to show it."""
    zeros, scalars = line.get("zero_scalars", 0), line.get("scalars", 0)
    if 2 * zeros <= scalars:
        return ""
    return f"[yellow]{zeros:.0f} of {scalars:.0f} scalars are 0: raise eps[/]"


def print_summary(console: Console, summary: Summary) -> None:
    """The final table, two answers before and after, and where the artefacts are."""
    table = Table(title="Result", title_justify="left", show_header=True)
    table.add_column("")
    table.add_column("base model", justify="right")
    table.add_column("fine-tuned", justify="right")
    base, final = summary.base, summary.final
    table.add_row("held-out loss", f"{base['loss']:.4f}", f"[bold]{final['loss']:.4f}[/]")
    for name, called in SHARES.items():
        if name in base and name in final:
            table.add_row(f"held-out {called}", f"{base[name]:.1%}", f"{final[name]:.1%}")
    if fair := summary.fairness:
        for key, called in (
            ("mean", "mean"),
            ("worst_decile", "worst tenth"),
            ("best_decile", "best tenth"),
        ):
            table.add_row(
                f"clients' own loss, {called}", *(f"{fair[w][key]:.4f}" for w in ("base", "final"))
            )
    console.print(table)
    _print_costs(console, summary)
    for warning in summary.warnings:
        if warning["id"] in VERDICTS:  # others were told when the run began
            say_warning(console, warning["text"])
    if summary.privacy:
        console.print(f"privacy  {escape(summary.privacy)}", soft_wrap=True, highlight=False)
    for before, after in zip(summary.before, summary.after, strict=True):
        answers = Table(show_header=False, box=None, padding=(0, 1))
        answers.add_column(style="dim", no_wrap=True)
        answers.add_column(overflow="fold")
        answers.add_row("prompt", escape(_short(before.prompt)))
        answers.add_row("base model", escape(_short(before.answer) or "(nothing)"))
        answers.add_row("fine-tuned", f"[bold]{escape(_short(after.answer) or '(nothing)')}[/]")
        answers.add_row("data", escape(_short(before.reference)))
        console.print(answers)
    console.print(
        f"{summary.artefact.name} {escape(str(summary.artefact))}  "
        f"(sha256 {summary.adapter_hash[:16]}…; {summary.proof.line})",
        highlight=False,
        soft_wrap=True,
    )
    _print_ranks(console, summary)
    if summary.personal:
        console.print(
            f"personal adapters {escape(str(summary.folder / 'clients'))}/<client>/adapter  "
            f"(not loaded again; {summary.artefact.name}/ is only what the clients share: judge "
            f"this run by the loss of clients)",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report  {escape(str(summary.folder / 'report.html'))}", soft_wrap=True)
    asked = [f"corolla chat {summary.folder}"] if summary.answers else []
    following = "; ".join([*asked, f"corolla evaluate {summary.folder}"])
    console.print(f"next    {escape(following)}", highlight=False, soft_wrap=True)


def _print_ranks(console: Console, summary: Summary) -> None:
    """Prints the ranks and sizes of adapters, and what `max_rank` has cut."""
    if summary.served:
        told = sentence(summary.served.to_json(summary.final["loss"]))
        console.print(f"ranks  {told}", highlight=False, soft_wrap=True)
    if errors := summary.rank_errors:
        console.print(
            f"max-rank  {sum(error > 0 for error in errors)} of {len(errors)} rounds were cut: the "
            f"last {errors[-1]:.2%} off in effective weights, the worst {max(errors):.2%}",
            highlight=False,
            soft_wrap=True,
        )


def _print_costs(console: Console, summary: Summary) -> None:
    """Prints the bytes that travelled, how long the run took, and its memory."""
    costs = Table("", "sent by clients", "received by clients", title="Bytes", title_justify="left")
    costs.add_row(
        "all clients, all rounds", human_bytes(summary.bytes_up), human_bytes(summary.bytes_down)
    )
    up, down = (f"{human_bytes(n)} ({human_bytes(f)})" for n, f in summary.per_client)
    costs.add_row("mean of the last round's clients (by the formula)", up, down)
    console.print(costs)
    simulated = summary.sim_seconds
    told = f", {simulated:,.1f} s simulated" if simulated is not None else ""
    console.print(
        f"time {summary.seconds:.1f} s{told}; peak memory of this process "
        f"{human_bytes(summary.peak_rss)}",
        highlight=False,
    )


def _short(text: str, limit: int = 240) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
