"""A warning on the terminal, for commands that train and for those that only read."""

from rich.console import Console
from rich.markup import escape


def say_warning(console: Console, text: str) -> None:
    """Prints a warning in one line."""
    console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)
