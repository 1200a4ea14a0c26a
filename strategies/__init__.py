"""Aggregation strategies by name: one file per algorithm, both halves of the paper in it."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping

from corolla.errors import ConfigError
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedkseed import FedKSeed
from corolla.strategies.fedkseed_pro import FedKSeedPro
from corolla.strategies.fedmezo import FedMeZO
from corolla.strategies.ferret import Ferret
from corolla.strategies.ffa_lora import FfaLora
from corolla.strategies.flora import Flora
from corolla.strategies.mixed import Mixed
from corolla.strategies.seed_pool import SeedPool
from corolla.types import Strategy, Traits

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "ffa_lora": FfaLora,
    "flora": Flora,
    "seed_pool": SeedPool,
    "fedkseed": FedKSeed,
    "fedkseed_pro": FedKSeedPro,
    "fedmezo": FedMeZO,
    "ferret": Ferret,
    "mixed": Mixed,
}


def find(name: str) -> type[Strategy]:
    """The class of a strategy: a name of STRATEGIES, or `module:Class` for one of your own.

    Raises ConfigError for an unknown name (suggesting the nearest), a module that cannot be
    imported, or a class that lacks a part of the Strategy protocol.
    """
    if ":" not in name:
        known = STRATEGIES.get(name.replace("-", "_"))
        if known is None:
            near = difflib.get_close_matches(name.replace("-", "_"), STRATEGIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(STRATEGIES)}"
            raise ConfigError(
                f"unknown strategy {name!r}: {hint}, or name your own as module:Class"
            )
        return known
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"cannot import strategy {name!r}: {error!r}") from error
    if not isinstance(found, type):
        raise ConfigError(f"strategy {name!r} is not a class")
    missing = sorted(part for part in _PARTS if not hasattr(found, part))
    if missing:
        raise ConfigError(
            f"strategy {name!r} lacks {', '.join(missing)} (see corolla.types.Strategy)"
        )
    return found


def traits(strategy: Strategy | type[Strategy]) -> Traits:
    """What a strategy says of itself, with the defaults for what it does not say."""
    fields = dataclasses.fields(Traits)
    return Traits(**{f.name: getattr(strategy, f.name, f.default) for f in fields})


def create(name: str, options: Mapping[str, object] | None = None) -> Strategy:
    """A strategy with its hyper-parameters. Raises ConfigError for an unknown or bad option."""
    cls = find(name)
    known: list[str] = (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    )
    for key in options or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(
                f"strategy {name} has no option {key!r}: "
                + (f"did you mean {near[0]!r}?" if near else has)
            )
    try:
        return cls(**(options or {}))
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
