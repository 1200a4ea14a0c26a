"""The terminal view of a check."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corolla.commands.check.findings import Finding, Result
from corolla.host.wording import written


def print_findings(console: Console, results: Sequence[Result]) -> None:
    """A table: checks down, models across; another one of options; then what was found."""
    for result in results:
        usual = [f for f in result.findings if f.options == result.options]
        console.print(_of_models(result, usual))
        tried = [f for f in result.findings if f.options != result.options]
        if tried:
            console.print(_of_options(tried))
        for finding in result.findings:
            if finding.note and not (finding in tried and finding.passed):
                colour = "dim" if finding.passed else "red"
                console.print(f"  {_place(finding)}: {escape(finding.note)}", style=colour)
        took = f"{result.seconds:.1f} s, {result.cpu_seconds:.1f} s of CPU time"
        console.print(f"  {len(result.findings)} proofs in {took}", style="dim")


def _of_models(result: Result, findings: Sequence[Finding]) -> Table:
    columns = list(dict.fromkeys(finding.model for finding in findings))
    verdict = "[green]passed[/]" if result.passed else "[red]FAILED[/]"
    claim = f"mean of {result.aggregates}"
    if result.aggregates == "other":
        claim = "what it says to expect"
    if not result.claims:
        claim = "[yellow]it claims no mean, so none was checked[/]"
    with_options = f" with {_said(result.options)}" if result.options else ""
    title = f"{escape(result.strategy)}{with_options}: {verdict} ({claim})"
    table = Table("check", *columns, "limit", title=title, title_justify="left")
    for check in dict.fromkeys(finding.check for finding in findings):
        row = {f.model: f for f in findings if f.check == check}
        cells = [_cell(row[model]) if model in row else "" for model in columns]
        table.add_row(check, *cells, f"{next(iter(row.values())).limit:.0e}")
    return table


def _of_options(findings: Sequence[Finding]) -> Table:
    """Each setting in a row: how many proofs there were, and which failed."""
    table = Table("option", "model", "proofs", "failed")
    for said, model, own in _by_setting(findings):
        failed = ", ".join(f.check for f in own if not f.passed)
        table.add_row(said, model, f"{len(own)}", f"[red]{failed}[/]" if failed else "[green]-[/]")
    return table


def _by_setting(findings: Sequence[Finding]) -> Iterator[tuple[str, str, list[Finding]]]:
    for said, model in dict.fromkeys((_said(f.options), f.model) for f in findings):
        yield said, model, [f for f in findings if (_said(f.options), f.model) == (said, model)]


def _said(options: Mapping[str, object]) -> str:
    return escape(", ".join(f"{name}={written(value)}" for name, value in options.items()))


def _place(finding: Finding) -> str:
    with_options = f" with {_said(finding.options)}" if finding.options else ""
    return f"{finding.check}, {finding.model}{with_options}"


def _cell(finding: Finding) -> str:
    return f"[{'green' if finding.passed else 'red'}]{finding.measured:.1e}[/]"
