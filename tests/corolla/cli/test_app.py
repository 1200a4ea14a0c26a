import subprocess
import sys

import typer

from corolla.cli.app import app


def test_commands_are_listed_in_the_order_in_which_one_needs_them() -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, typer.core.TyperGroup)
    assert " ".join(commands.commands) == (
        "simulate plan compare check audit status strategies evaluate export tokens certs server "
        "client gateway phone"
    )


def test_help_does_not_wait_for_the_libraries_of_training() -> None:
    """They take seconds to import."""
    code = (
        "import sys; from typer.testing import CliRunner; from corolla.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'peft', 'pydantic', 'flwr'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
