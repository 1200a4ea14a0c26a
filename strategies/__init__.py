"""Aggregation strategies by name: one file per algorithm, both halves of the paper in it."""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from corolla.errors import ConfigError
from corolla.interfaces import Strategy, Traits
from corolla.strategies.fed_sb import FedSb
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedavgm import FedAvgM
from corolla.strategies.feddpa import FedDpa
from corolla.strategies.fedex_lora import FedExLora
from corolla.strategies.fedkseed import FedKSeed
from corolla.strategies.fedkseed_pro import FedKSeedPro
from corolla.strategies.fedmezo import FedMeZO
from corolla.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from corolla.strategies.fedprox import FedProx
from corolla.strategies.fedsa_lora import FedSaLora
from corolla.strategies.fedsvd import FedSvd
from corolla.strategies.ferret import Ferret
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.flexlora import FlexLora
from corolla.strategies.flora import Flora
from corolla.strategies.hetlora import HetLora
from corolla.strategies.lora_fair import LoraFair
from corolla.strategies.mixed import Mixed
from corolla.strategies.rolora import RoLora
from corolla.strategies.scaffold import Scaffold
from corolla.strategies.seed_pool import SeedPool

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "ffa_lora": FfaLora,
    "flora": Flora,
    "fedex_lora": FedExLora,
    "flexlora": FlexLora,
    "lora_fair": LoraFair,
    "rolora": RoLora,
    "fedsvd": FedSvd,
    "fed_sb": FedSb,
    "hetlora": HetLora,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedsa_lora": FedSaLora,
    "feddpa": FedDpa,
    "seed_pool": SeedPool,
    "fedkseed": FedKSeed,
    "fedkseed_pro": FedKSeedPro,
    "fedmezo": FedMeZO,
    "ferret": Ferret,
    "mixed": Mixed,
}


def find(name: str) -> type[Strategy]:
    """The class of a strategy: a name of STRATEGIES; `module:Class` or `FILE.py:Class` for yours.

    Raises ConfigError for an unknown name (suggesting the nearest), a module that cannot be
    imported, or a class that lacks a part of the Strategy protocol.
    """
    if ":" not in name:
        known = STRATEGIES.get(name.replace("-", "_"))
        if known is None:
            near = difflib.get_close_matches(name.replace("-", "_"), STRATEGIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(STRATEGIES)}"
            raise ConfigError(
                f"unknown strategy {name!r}: {hint}, or name your own as module:Class or "
                f"FILE.py:Class"
            )
        return known
    module, _, attribute = name.rpartition(":")
    try:
        home = _load(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"cannot import strategy {name!r}: {error!r}") from error
    found: object = getattr(home, attribute, None)
    if found is None:
        own = [n for n, value in vars(home).items() if isinstance(value, type)]
        near = difflib.get_close_matches(attribute, own, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"cannot import strategy {name!r}: no {attribute!r} in {module}{hint}")
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


def traits(strategy: Strategy | type[Strategy]) -> Traits:
    """What a strategy says of itself, with the defaults for what it does not say."""
    fields = dataclasses.fields(Traits)
    said: dict[str, Any] = {f.name: getattr(strategy, f.name, f.default) for f in fields}
    return Traits(**said)


def create(name: str, options: Mapping[str, object] | None = None) -> Strategy:
    """A strategy with its hyper-parameters. Raises ConfigError for an unknown or bad option."""
    cls, given = find(name), options or {}
    usual: dict[str, object] = (
        {f.name: f.default for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else {}
    )
    for key, value in given.items():
        if key not in usual:
            near = difflib.get_close_matches(key, usual, n=1)
            has = f"its options are {', '.join(usual)}" if usual else "it has no options"
            raise ConfigError(
                f"strategy {name} has no option {key!r}: "
                + (f"did you mean {near[0]!r}?" if near else has)
            )
        if isinstance(usual[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"strategy {name}: {key} is true or false, found {value!r}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name}: {error}") from error


_PARTS = (
    *(
        "name",
        "aggregates",
        "mixed_ranks",
        "trainers",
        "full",
        "init",
        "broadcast",
        "local",
        "update_like",
    ),
    *("aggregator", "apply", "adapter", "cost"),
)
