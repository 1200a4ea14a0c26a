"""How a config is given: a TOML file, --set key=value and the options of a command."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.config.build import build_strategy
from corolla.config.mistakes import no_table, unknown
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.host import wording
from corolla.strategies.listing import registry

NAMED = ("columns", "splits")
VALUED = ("rank_pattern", "alpha_pattern")
"""Keys that are tables by names, of names and of values: NAME.field=value sets one of them."""

SERVER = "server"
"""The table of a config file that is of the machine `corolla server` runs on, not of the run."""


def load(
    file: Path | None, overrides: Mapping[str, object], settings: Sequence[str] = ()
) -> RunConfig:
    """Defaults, then the TOML file, then --set key=value, then the command's own options.

    A key may be written with - or _. `[NAME]` tables and `NAME.field=value` set options of the
    strategy NAME; `strategy.field=value` those of the chosen one. Raises ConfigError with the
    nearest known name for an unknown key.
    """
    return validate(_gather(file, overrides, settings))


def resumed(
    folder: Path, file: Path | None, overrides: Mapping[str, object], settings: Sequence[str] = ()
) -> RunConfig:
    """The config of the run in `folder`, with more rounds if asked: see `unchanged`.

    Its budgets are those that were given, which run.json keeps beside what they led to.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(
            f"nothing to resume in {folder}: it has no run.json; leave --resume out to begin"
        )
    try:
        info = json.loads(path.read_text())
        stored = validate({**info["config"], **info.get("budget", {}).get("given", {})})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error
    return unchanged(stored, overrides, settings, file)


def unchanged(
    stored: RunConfig,
    overrides: Mapping[str, object],
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> RunConfig:
    """A stored config; `rounds` alone may be raised, to extend a run.

    Raises ConfigError when what is given contradicts it, and for more rounds with privacy.
    """
    asked = amended(stored, overrides, settings, file)
    extends = asked.rounds > stored.rounds
    if extends and stored.dp != "none":
        raise ConfigError(
            f"a run of rounds={stored.rounds} with dp={stored.dp} cannot be extended: its privacy "
            f"is accounted for so many; leave --rounds out, or start a new run"
        )
    for key in RunConfig.model_fields:
        if getattr(asked, key) != getattr(stored, key) and not (extends and key == "rounds"):
            raise ConfigError(
                f"--resume goes on with {key.replace('_', '-')}={getattr(stored, key)!r}, "
                f"found {getattr(asked, key)!r}: leave it out"
            )
    return asked


def amended(
    stored: RunConfig,
    overrides: Mapping[str, object],
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> RunConfig:
    """A stored config with what is given put over it. Raises ConfigError as `load` does."""
    given = _gather(file, overrides, settings, stored.strategy)
    return validate({**stored.model_dump(), **given})


def server_table(file: Path) -> dict[str, Any]:
    """The [server] table of a config file: what `corolla server` reads beside the run's keys."""
    table = _read(file).get(SERVER, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{SERVER} in {file} is no table: write [{SERVER}]")
    return {_key(key): value for key, value in table.items()}


def _gather(
    file: Path | None,
    overrides: Mapping[str, object],
    settings: Sequence[str],
    default_strategy: str = "fedavg",
) -> dict[str, Any]:
    """Returns the settings that were given, and nothing else, by keys of RunConfig."""
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in (_read(file) if file else {}).items():
        if key != SERVER:
            _assign(values, tables, _key(key), value, str(file))
    named: set[str] = set()
    given = {key: value for key, value in overrides.items() if value is not None}
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found:
            raise ConfigError(
                f"--set {setting!r}: expected key=value (corolla keys lists and explains all keys)"
            )
        name, value = _key(key.strip()), wording.read(text)
        named |= {name.partition(".")[0]} & registry.STRATEGIES.keys()
        if name in given and given[name] != value:
            raise ConfigError(
                f"{key.strip()} is given twice, as --set {setting} and as {given[name]!r}: give one"
            )
        _assign(values, tables, name, value, "--set")
    values |= given
    if "strategy" in values and ":" not in str(values["strategy"]):
        values["strategy"] = str(values["strategy"]).replace("-", "_")
    chosen = str(values.get("strategy", default_strategy))
    for table in named - {"strategy", chosen}:
        raise ConfigError(f"{table}.NAME in --set is for strategy {table}, found {chosen}")
    options = {**tables.get("strategy", {}), **tables.get(chosen, {})}
    before = values.get("options", {})
    if not options or not isinstance(before, dict):  # what is no table is told with all keys
        return values
    return {**values, "options": {**before, **options}}


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig. Raises ConfigError with one line for the first thing that is wrong."""
    config = RunConfig.model_validate(values)
    build_strategy(config)
    return config


def _assign(
    values: dict[str, Any], tables: dict[str, dict[str, Any]], key: str, value: Any, source: str
) -> None:
    table, dot, field = key.partition(".")
    if table == "classes" and dot:  # classes.phone.lr=1e-3
        _assign_class(values, field, value, source)
    elif isinstance(value, dict) and not dot and key != "options":
        for name, entry in value.items():
            _assign(values, tables, f"{key}.{name}", entry, source)
    elif dot and table in NAMED:  # columns.prompt=body
        _assign_name(values, table, field, value, source)
    elif dot and table in VALUED:  # rank-pattern.q_proj=4
        before = values.get(table, {})
        values[table] = {**(before if isinstance(before, dict) else {}), field: value}
    elif dot:
        if table not in registry.STRATEGIES and table != "strategy":
            raise no_table(table, field, RunConfig.model_fields, source)
        tables.setdefault(table, {})[field.replace("-", "_")] = value
    elif key not in RunConfig.model_fields:
        raise unknown(key, RunConfig.model_fields, source)
    else:
        values[key] = value


def _assign_name(values: dict[str, Any], table: str, field: str, value: Any, source: str) -> None:
    """`NAME` of a table of names. A number is a name too: columns of CSV may be called so."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ConfigError(f"{table}.{field} in {source}: expected a name, found {value!r}")
    names = values.get(table, {})
    if not isinstance(names, dict):
        raise ConfigError(f"{table} in {source}: expected {table}.NAME=theirs")
    values[table] = {**names, field: str(value)}


def _key(text: str) -> str:
    """A key may be written with -; the name of a class stays as it is."""
    return text if text.startswith("classes.") else text.replace("-", "_")


def _assign_class(values: dict[str, Any], field: str, value: Any, source: str) -> None:
    """`NAME.key` of the table of classes, or NAME with a table of keys."""
    name, _, entry = field.partition(".")
    given = {entry: value} if entry else value
    classes = values.setdefault("classes", {})
    if not name or not isinstance(given, dict) or not isinstance(classes, dict):
        raise ConfigError(f"classes.{field} in {source}: expected classes.NAME.KEY=value")
    own = classes.setdefault(name, {})
    for part, setting in given.items():
        known = part.replace("-", "_")
        if known not in ClientClass.model_fields:
            raise unknown(known, ClientClass.model_fields, source)
        own[known] = setting


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from error
