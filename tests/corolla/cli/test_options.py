from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from corolla.cli.options import RUN, Given, Option, run_options, takes
from corolla.config.run import RunConfig

TABLE = {
    "size": Option(int, "How large.", 3, more={"min": 1}),
    "name": Option(str | None, "How it is called.", flags=("--called",)),
}


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer(rich_markup_mode=None)

    @takes(options=TABLE, others={"needed": Option(float, "Must be given.", ...)})
    def command(
        *, first: bool = False, options: Given, others: Given, last: Annotated[str, typer.Option()]
    ) -> None:
        """Print what it was given."""
        print(first, options, others, last)

    made.command()(command)
    return made


def test_a_command_gets_the_options_of_a_table_as_one_dict(app: typer.Typer) -> None:
    given = ["--needed", "0.5", "--last", "z", "--called", "a"]
    assert CliRunner().invoke(app, given).output == (
        "False {'size': 3, 'name': 'a'} {'needed': 0.5} z\n"
    )


def test_options_stand_where_the_parameter_stands(app: typer.Typer) -> None:
    names = [parameter.name for parameter in typer.main.get_command(app).params]
    assert names[:5] == ["first", "size", "name", "needed", "last"]
    assert typer.main.get_command(app).help == "Print what it was given."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--last", "z"], "Missing option '--needed'"),
        (["--last", "z", "--needed", "1", "--size", "0"], "Invalid value for '--size'"),
        (["--last", "z", "--needed", "1", "--name", "a"], "--name"),
    ],
)
def test_options_are_checked(app: typer.Typer, given: list[str], message: str) -> None:
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert message in result.output


def test_options_of_a_run_are_keys_of_its_config() -> None:
    assert RUN.keys() <= RunConfig.model_fields.keys()


def test_a_command_may_leave_options_out_and_explain_others_anew() -> None:
    table = run_options("clients", "engine", lr="Another text.")
    assert list(table) == [name for name in RUN if name not in ("clients", "engine")]
    assert table["lr"] == RUN["lr"]._replace(help="Another text.")
    assert table["rank"] == RUN["rank"]
