"""Strategies by name: all of Corolla's own, and how one is found and made."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from corolla.errors import ConfigError
from corolla.host.text import nearest
from corolla.interfaces import Strategy, Traits
from corolla.strategies.listing import files
from corolla.strategies.listing import options as options_of
from corolla.strategies.listing.mark import LISTED

_FIRST = "fedavg"
"""The strategy that most others change one thing of: lists and advice begin with it."""


def _all() -> dict[str, type[Strategy]]:
    """Imports all files of the strategies, and takes the classes that are marked in them."""
    folder = __name__.rpartition(".listing.")[0]
    for file in pkgutil.walk_packages(importlib.import_module(folder).__path__, f"{folder}."):
        importlib.import_module(file.name)
    own = [cls for cls in LISTED if cls.__module__.startswith(f"{folder}.")]
    return {cls.name: cls for cls in sorted(own, key=lambda cls: (cls.name != _FIRST, cls.name))}


STRATEGIES: Mapping[str, type[Strategy]] = _all()
"""Name → class, `fedavg` and then by the alphabet: each is marked as `listed` in its own file."""


def find(name: str) -> type[Strategy]:
    """The class of a strategy: a name of STRATEGIES; `module:Class` or `FILE.py:Class` for yours.

    Raises ConfigError for an unknown name (suggesting the nearest), a module that cannot be
    imported, or a class that lacks a part of the Strategy protocol.
    """
    if ":" in name:
        return files.find(name)
    known = STRATEGIES.get(name.replace("-", "_"))
    if known is None:
        near = nearest(name.replace("-", "_"), STRATEGIES)
        own = (
            f"{near} Your own is"
            if near
            else f"choose from {', '.join(STRATEGIES)}, or name your own as"
        )
        raise ConfigError(f"unknown strategy {name!r}: {own} module:Class or FILE.py:Class")
    return known


def label(name: str) -> str:
    """Returns a strategy's name, as people say it: its key here; of one's own, its `name`.

    A class that has none of its own, only that of the class it extends, is called as the class.
    Raises ConfigError as `find` does.
    """
    cls = find(name)
    return str(cls.name) if "name" in vars(cls) else cls.__name__


def create(name: str, options: Mapping[str, object] | None = None) -> Strategy:
    """A strategy with its hyper-parameters. Raises ConfigError for an unknown or bad option."""
    cls, given = find(name), options or {}
    usual: dict[str, object] = (
        {f.name: f.default for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else {}
    )
    types = options_of.types(cls)
    for key, value in given.items():
        if key not in usual:
            has = f"its options are {', '.join(usual)}" if usual else "it has no options"
            hint = nearest(key, usual) or has
            raise ConfigError(f"strategy {name} has no option {key!r}: {hint}")
        if wanted := options_of.misfit(types.get(key, type(usual[key])), value):
            raise ConfigError(f"strategy {name}: {key} is {wanted}, found {value!r}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name}: {error}") from error


def traits(strategy: Strategy | type[Strategy]) -> Traits:
    """Returns the traits of a strategy, with the defaults for those that it does not state."""
    fields = dataclasses.fields(Traits)
    said: dict[str, Any] = {f.name: getattr(strategy, f.name, f.default) for f in fields}
    return Traits(**said)
