"""Strategies of one's own, which are no part of Corolla: `FILE.py:Class` or `module:Class`."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from corolla.errors import ConfigError
from corolla.host.text import nearest
from corolla.interfaces import Strategy

_PARTS = (
    "name",
    "aggregates",
    "mixed_ranks",
    "trainers",
    "full",
    "init",
    "broadcast",
    "local",
    "update_like",
    "aggregator",
    "apply",
    "adapter",
    "cost",
)
"""Names of the attributes of every class that follows the protocol `Strategy`."""


def find(name: str) -> type[Strategy]:
    """The class of `FILE.py:Class` or `module:Class`.

    Raises ConfigError for what cannot be imported, or a class that lacks a part of the Strategy
    protocol.
    """
    module, _, attribute = name.rpartition(":")
    try:
        home = _load(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"cannot import strategy {name!r}: {error!r}") from error
    found: object = getattr(home, attribute, None)
    if found is None:
        classes = [n for n, value in vars(home).items() if isinstance(value, type)]
        hint = nearest(attribute, classes)
        raise ConfigError(
            f"cannot import strategy {name!r}: no {attribute!r} in {module}"
            + (f": {hint}" if hint else "")
        )
    if not isinstance(found, type):
        raise ConfigError(f"strategy {name!r} is not a class")
    missing = sorted(part for part in _PARTS if not hasattr(found, part))
    if missing:
        raise ConfigError(
            f"strategy {name!r} lacks {', '.join(missing)} (see corolla.interfaces.Strategy)"
        )
    return found


def allowed(name: str, allow: Iterable[str], who: str) -> str:
    """The strategy itself; one of its own file or module is that which the owner has allowed.

    A file is known by its name, without its folder: that of the asker is of another machine. Raises
    ConfigError, before anything is imported, that says what this `who` does not run.
    """
    if ":" not in name:
        return name
    for own in allow:
        if Path(own).name == Path(name).name:
            return own
    raise ConfigError(f"this {who} does not run strategy {name!r}: its owner has not allowed it")


def absolute(name: str) -> str:
    """`FILE.py:Class` with the file's full path, any other name as it is."""
    path, _, attribute = name.rpartition(":")
    return f"{Path(path).resolve()}:{attribute}" if path.endswith(".py") else name


def digest(name: str) -> str | None:
    """sha256 of the file of `FILE.py:Class`; None for other names."""
    path, _, _ = name.rpartition(":")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path.endswith(".py") else None


def _load(path: Path) -> ModuleType:
    """A file as a module: the same one as long as its path and content are.

    Raises ConfigError when it cannot be read, and whatever its code raises.
    """
    path = path.resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read strategy file {path}: {error.strerror}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + content).hexdigest()
    name = f"corolla_strategy_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of their class
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
