"""What a terminal shows of a check."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from corolla.commands.check.findings import Finding, Result


def print_findings(console: Console, results: Sequence[Result]) -> None:
    """A table: checks down, models across."""
    for result in results:
        columns = list(dict.fromkeys(finding.model for finding in result.findings))
        verdict = "[green]passed[/]" if result.passed else "[red]FAILED[/]"
        claim = f"mean of {result.aggregates}"
        if result.aggregates == "other":
            claim = "what it says to expect"
            if not result.claims:
                claim = "[yellow]it claims no mean, so none was checked[/]"
        title = f"{result.strategy}: {verdict} ({claim})"
        table = Table("check", *columns, "limit", title=title, title_justify="left")
        for check in dict.fromkeys(finding.check for finding in result.findings):
            row = {f.model: f for f in result.findings if f.check == check}
            cells = [_cell(row[model]) if model in row else "" for model in columns]
            table.add_row(check, *cells, f"{next(iter(row.values())).limit:.0e}")
        console.print(table)
        for finding in result.findings:
            if finding.note:
                colour = "dim" if finding.passed else "red"
                console.print(f"  {finding.check}, {finding.model}: {finding.note}", style=colour)


def _cell(finding: Finding) -> str:
    return f"[{'green' if finding.passed else 'red'}]{finding.measured:.1e}[/]"
