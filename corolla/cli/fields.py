"""Options that are keys of settings: the field of a key says their type, default and help.

Fields are read when an option is given or explained, not when the command line is built: the list
of commands must not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from rich.markup import escape
from typer.core import TyperArgument, TyperCommand
from typer.utils import get_params_from_function

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Fields = Callable[[], "Mapping[str, FieldInfo]"]
"""Imports settings, and gives their fields by name."""

_TYPES: Mapping[Any, click.ParamType[Any, Any]] = {
    bool: click.BOOL,
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    Path: click.Path(path_type=Path),
}


def of_run() -> Mapping[str, FieldInfo]:
    """The keys of a run."""
    from corolla.config.sections.settings import Settings

    return Settings.model_fields


def with_default(text: str, usual: str, choices: Sequence[str] = ()) -> str:
    """A help text as markup, the words to choose from, and what holds where none is given."""
    told = f"{', '.join(choices)}; default: {usual}" if choices else f"default: {usual}"
    return f"{escape(text)} [dim]{escape(f'[{told}]')}[/]"


class FieldText(click.ParamType):  # type: ignore[type-arg]
    """The text of an option, read as the type of a field.

    Bounds and choices are left to the settings, which say the same of values in a file.
    """

    def __init__(self, key: str, fields: Fields, usual: str = "") -> None:
        self.key, self.fields, self.usual = key, fields, usual

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The name of the type."""
        kind, _ = self._types()
        return kind.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; lists and tables are written as --set takes them."""
        kind, _ = self._types()
        return kind.convert(value, param, ctx)

    def explained(self, own: str) -> str:
        """The text of the field, or its option's own, with choices and the default in effect."""
        from corolla.host import wording

        field, (_, choices) = self.fields()[self.key], self._types()
        text = own or field.description or ""
        usual = self.usual or wording.usual(field).partition(";")[0]
        return with_default(text, usual, choices)

    def _types(self) -> tuple[click.ParamType[Any, Any], tuple[str, ...]]:
        """Returns the click type that reads the text, and the words to choose from (or none)."""
        from corolla.host import wording

        form = wording.parts(self.fields()[self.key].annotation)[0]
        if get_origin(form) is Literal:
            return click.STRING, get_args(form)
        return _TYPES.get(form) or click.types.FuncParamType(wording.read), ()


class Command(TyperCommand):
    """A command whose help says of an option that is a key what the field of the key says."""

    def __init__(self, name: str | None, **given: Any) -> None:
        super().__init__(name, **given)
        told = get_params_from_function(given["callback"])
        for argument in self.params:  # click 8.5 forgets the help that typer 0.20 has given it
            if isinstance(argument, TyperArgument):
                argument.help = told[str(argument.name)].default.help

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments as click reads them; options that are missing are named all at once."""
        given = {own.partition("=")[0] for own in args}
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            options = [own for own in self.params if isinstance(own, click.Option) and own.required]
            lacking = [own.opts[0] for own in options if not given & set(own.opts)]
            if len(lacking) < 2:
                raise
            raise click.UsageError(f"Missing options {', '.join(lacking)}.", ctx) from error

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help, with the texts of fields for as long as that takes."""
        own = {option: option.help for option in self.params if isinstance(option, click.Option)}
        for option, text in own.items():
            if isinstance(option.type, FieldText):
                option.help = option.type.explained(text or "")
        try:
            super().format_help(ctx, formatter)
        finally:
            for option, text in own.items():
                option.help = text
