"""Options of a strategy away from their defaults: given with --set, and tried one at a time."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from corolla.commands.check.tables import TRIALS, Trial
from corolla.errors import ConfigError
from corolla.host import wording
from corolla.strategies.listing import registry
from corolla.strategies.listing.options import types


def given(names: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of each strategy: `strategy.KEY=VALUE` is for all of them, `NAME.KEY=VALUE` one.

    Raises ConfigError for what is no option of one of them, and for values it does not take.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    tables = {name.replace("-", "_"): name for name in names if ":" not in name}
    for setting in settings:
        key, equals, text = setting.partition("=")
        table, dot, option = (part.strip().replace("-", "_") for part in key.partition("."))
        if not (equals and dot and option and (table == "strategy" or table in tables)):
            raise ConfigError(
                f"--set {setting!r}: check takes options of the strategies that it checks, as "
                f"strategy.KEY=VALUE or NAME.KEY=VALUE; all else of its runs is fixed "
                f"(corolla keys strategies lists all options)"
            )
        for name in names if table == "strategy" else [tables[table]]:
            found[name][option] = wording.read(text)
    for name, options in found.items():
        registry.create(name, options)
    return found


def names(name: str, fixed: Mapping[str, object]) -> list[str]:
    """The options of a strategy that are not fixed."""
    return [field.name for field in _fields(name) if field.name not in fixed]


def trials(name: str, option: str, fixed: Mapping[str, object]) -> Sequence[Trial]:
    """The values to try: those of TRIALS, or those that follow from the option itself.

    A `Literal` is tried with all other values, any other type with the option's example or, where
    it has none, with a value near its default. Raises ConfigError where the strategy takes none.
    """
    cls: Any = registry.find(name)
    (field,) = (field for field in _fields(name) if field.name == option)
    beside = field.metadata.get("beside", {})
    if (cls.name, option) in TRIALS:
        return TRIALS[cls.name, option]
    kind = types(cls).get(option)
    if typing.get_origin(kind) is Literal:
        others = [value for value in typing.get_args(kind) if value != field.default]
        return [Trial(value, beside) for value in others]
    if "example" in field.metadata:
        example = field.metadata["example"]
        return [] if example == field.default else [Trial(example, beside)]
    for value in _neighbours(field.default):
        try:
            registry.create(name, {**fixed, option: value})
        except ConfigError:
            continue
        return [Trial(value)]
    raise ConfigError(
        f"no value beside its default {field.default!r} was found to try: declare it with "
        f"corolla.strategies.listing.options.option(default, text, example)"
    )


def _fields(name: str) -> Sequence[dataclasses.Field[Any]]:
    cls: Any = registry.find(name)
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _neighbours(default: object) -> Iterator[object]:
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int):
        yield from (default + 1, 2 * default, default // 2, default - 1)
    elif isinstance(default, float):
        yield from (default / 2, 2 * default, 0.5, default + 0.1)
