"""The command line: the commands in their order, and how what goes wrong ends them."""

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from corolla.cli import deployment, local, results
from corolla.cli.fields import Command
from corolla.cli.screen import err, out
from corolla.errors import CorollaError
from corolla.host.files import private
from corolla.version import __version__

# Before anything imports them: no telemetry, no update check, no advice of tokenizers on forks.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is said by us, in one line

app = typer.Typer(
    name="corolla",
    help="Federated fine-tuning of language models on Flower.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click 8.5 does so itself
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def _user_errors() -> Iterator[None]:
    """One line and an exit code for what a user can cause."""
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    except CorollaError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder without permission
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        err.print("[yellow]stopped[/]")
        raise typer.Exit(1) from None


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, ended by what a user can cause as `_user_errors` says.

    What runs and devices keep is private; what others are to have, such as exports, is as usual.
    """
    kept = private if command in _KEEPING else nullcontext

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with _user_errors(), kept():
            command(**given)

    return run


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"corolla {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Federated fine-tuning of language models on Flower."""
    sys.path.insert(0, str(Path.cwd()))  # strategies of one's own: module:Class in this folder
    if hasattr(signal, "SIGCHLD"):  # ignored by some parents: then no child's exit code is known
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Simulate and compare": (
        local.data,
        local.simulate,
        local.plan,
        local.compare,
        local.check,
        local.audit,
    ),
    "Deploy": (
        deployment.certs,
        deployment.members,
        deployment.server,
        deployment.client,
        deployment.gateway,
        deployment.phone,
        deployment.tokens,
        deployment.status,
    ),
    "Artefacts": (results.evaluate, results.chat, results.edit, results.port, results.export),
    "Reference": (local.strategies, local.keys),
}
"""Heading in `corolla --help` → its commands, in the order in which one needs them."""

_KEEPING = (
    *(local.simulate, local.compare, local.audit),
    *(deployment.server, deployment.client, deployment.gateway, deployment.phone),
)
"""Commands whose files tell of clients: journals, checkpoints, updates, ledgers."""

for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(cls=Command, rich_help_panel=_panel)(_guarded(_command))
