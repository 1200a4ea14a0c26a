"""The lines that commands print, and the consoles that they print on."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

# Text of users and of errors is shown as it is: ":abc:" is no name of a picture.
out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


def say(line: str) -> None:
    """Prints a line as it is, without markup and without line breaks of its own."""
    out.print(escape(line), highlight=False, soft_wrap=True)


def spinner(silent: bool) -> Callable[[str], None]:
    """Says what is being checked; nothing when the output is for a machine."""
    return (lambda text: None) if silent else (lambda text: out.print(text, style="dim"))
