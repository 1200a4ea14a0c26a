import subprocess
import sys

import typer
from typer.testing import CliRunner

from corolla.cli.app import app


def test_commands_are_listed_in_the_order_in_which_one_needs_them() -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, typer.core.TyperGroup)
    assert " ".join(commands.commands) == (
        "data simulate plan compare check audit certs members server client gateway phone tokens "
        "status evaluate chat edit port export strategies keys"
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


def test_commands_are_listed_under_headings() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    headings = ["Simulate and compare", "Deploy", "Artefacts", "Reference"]
    places = [shown.index(f" {heading} ") for heading in headings]
    assert places == sorted(places)
    assert shown.index(" export ") < places[-1] < shown.index(" keys ")


def test_help_of_a_command_does_not_wait_for_torch() -> None:
    """It reads the keys of a run, which need pydantic alone."""
    code = (
        "import sys; from typer.testing import CliRunner; from corolla.cli.app import app\n"
        "shown = CliRunner().invoke(app, ['simulate', '--help']).output\n"
        "print('default: fedavg' in shown, sorted({'torch', 'peft', 'flwr'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "True []\n"


def test_a_misspelt_command_is_suggested_once() -> None:
    output = CliRunner().invoke(app, ["simlate"]).output
    assert output.count("Did you mean 'simulate'?") == 1
