from typing import Annotated, Any, Literal, get_origin

import pytest
import typer
from typer.testing import CliRunner

from corolla.cli.app import app as main
from corolla.cli.fields import Command, of_run
from corolla.cli.options import RUN, Given, Option, keys, run_options, takes
from corolla.config.keys import table
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

    made.command(cls=Command)(command)
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
        (["--size", "4"], "Missing options --needed, --last."),
        (["--needed=1"], "Missing option '--last'"),
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


@pytest.fixture
def keyed() -> typer.Typer:
    """A command with a key of each type as an option, whether a command has it or not."""
    made = typer.Typer()
    table = keys(
        of_run, "rounds", "lr", "model", "dp", "rslora", "ranks", "classes", "target_modules"
    )

    @takes(options=table)
    def command(*, word: Annotated[str, typer.Argument(help="A word.")], options: Given) -> None:
        """Print what it was given."""
        print({key: value for key, value in options.items() if value is not None})

    made.command(cls=Command)(command)
    return made


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--rounds", "3"], {"rounds": 3}),
        (["--lr", "1"], {"lr": 1.0}),
        (["--model", "7"], {"model": "7"}),
        (["--dp", "anything"], {"dp": "anything"}),
        (["--rslora", "true"], {"rslora": True}),
        (["--ranks", "[4, 8]"], {"ranks": [4, 8]}),
        (["--target-modules", '["q"]'], {"target_modules": ["q"]}),
        (["--classes", '{"a": {"share": 2}}'], {"classes": {"a": {"share": 2}}}),
        ([], {}),
    ],
)
def test_an_option_that_is_a_key_is_read_as_its_field_says(
    keyed: typer.Typer, given: list[str], value: dict[str, Any]
) -> None:
    assert CliRunner().invoke(keyed, ["word", *given]).output == f"{value}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "many"], "'many' is not a valid integer"),
        (["--rounds", "1.5"], "'1.5' is not a valid integer"),
        (["--lr", "high"], "'high' is not a valid float"),
        (["--rslora", "maybe"], "'maybe' is not a valid boolean"),
    ],
)
def test_text_that_is_no_number_is_refused(
    keyed: typer.Typer, given: list[str], message: str
) -> None:
    result = CliRunner().invoke(keyed, ["word", *given], env={"COLUMNS": "120"})
    assert (result.exit_code, message in result.output) == (2, True)


def help_of(app: typer.Typer, *words: str) -> str:
    """Returns the text of --help, on one line."""
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400"}).output
    return " ".join(shown.split())


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_help_of_a_key_is_what_its_field_says(command: str) -> None:
    shown, again = help_of(main, command), help_of(main, command)
    assert shown == again
    for key in table():
        if key.name in RUN:
            form = get_origin(RunConfig.model_fields[key.name].annotation)
            words = f"{key.kind}; " if form is Literal else ""
            usual = key.usual.partition(";")[0]
            assert f"{key.text} [{words}default: {usual}]" in shown


def test_a_command_says_what_an_option_means_there() -> None:
    shown = help_of(main, "compare")
    assert "The middle of the three learning rates that are tried. [default: 0.0003" in shown
    assert "[default: 4 with the embedded model and data, else 8, or all clients]" in shown
    assert "The learning rate of local steps." not in shown


def test_types_and_texts_of_every_form_are_shown(keyed: typer.Typer) -> None:
    shown = help_of(keyed)
    for part in ("--rounds INTEGER The", "--lr FLOAT The", "--model TEXT The", "--rslora Whether"):
        assert part in shown
    assert "[default: rank, for all clients]" in shown


def test_arguments_are_explained(keyed: typer.Typer) -> None:
    """Click 8.5 forgets what typer 0.20 has told it of them."""
    assert "A word. [required]" in help_of(keyed)
    for command, text in (
        ("compare", "Two or more: NAME"),
        ("check", "or all, the default."),
        ("keys", "A key, or a word"),
    ):
        assert text in help_of(main, command)


def test_a_command_may_leave_options_out_and_explain_others_anew() -> None:
    found = run_options("clients", "engine", lr="Another text.")
    assert list(found) == [name for name in RUN if name not in ("clients", "engine")]
    assert found["lr"] == RUN["lr"]._replace(help="Another text.")
    assert found["rank"] == RUN["rank"]
