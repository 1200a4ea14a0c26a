"""Strategies by name: the table of Corolla's own, and how one is found and made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from corolla.errors import ConfigError
from corolla.host.text import nearest
from corolla.interfaces import Strategy, Traits
from corolla.strategies import files
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
    if ":" in name:
        return files.find(name)
    known = STRATEGIES.get(name.replace("-", "_"))
    if known is None:
        hint = nearest(name.replace("-", "_"), STRATEGIES) or f"choose from {', '.join(STRATEGIES)}"
        raise ConfigError(
            f"unknown strategy {name!r}: {hint}, or name your own as module:Class or FILE.py:Class"
        )
    return known


def label(name: str) -> str:
    """What people call a strategy, everywhere: its key here; of one's own its `name`.

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
    for key, value in given.items():
        if key not in usual:
            has = f"its options are {', '.join(usual)}" if usual else "it has no options"
            hint = nearest(key, usual) or has
            raise ConfigError(f"strategy {name} has no option {key!r}: {hint}")
        if isinstance(usual[key], bool) and not isinstance(value, bool):
            raise ConfigError(f"strategy {name}: {key} is true or false, found {value!r}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name}: {error}") from error


def traits(strategy: Strategy | type[Strategy]) -> Traits:
    """What a strategy says of itself, with the defaults for what it does not say."""
    fields = dataclasses.fields(Traits)
    said: dict[str, Any] = {f.name: getattr(strategy, f.name, f.default) for f in fields}
    return Traits(**said)
