"""`corolla plan --fit`: the most that devices can train within their limits, as settings.

Reads config.json and the headers of the model's files; neither data nor weights. Sequences are
taken to be of the largest length.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from corolla.budgets.devices import Device, Limits, Need, Traffic, Way
from corolla.commands.plan.throughput import throughput
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.errors import ConfigError
from corolla.estimates import footprint
from corolla.estimates.footprint import Batch
from corolla.host.text import human_bytes, parse_bytes
from corolla.models import anatomy, layers
from corolla.models.anatomy import Anatomy
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.tasks import costs
from corolla.tensors import units
from corolla.types import LoraSpec, Params

_EXAMPLES = 1 << 20
"""Training examples of a client whose update is priced: their number decides no bytes here."""
_SMALLER = {"none": ("none", "8bit", "4bit"), "8bit": ("8bit", "4bit"), "4bit": ("4bit",)}
"""Quantisation of the settings → those that may be tried, from the widest."""


@dataclass(frozen=True)
class Fitted:
    """The settings of the devices of a class, and what they need."""

    limits: Limits
    way: Way
    need: Need


@dataclass(frozen=True)
class Fit:
    """The choice for each class of devices; "" where all are alike."""

    config: RunConfig
    model: Anatomy
    found: Mapping[str, Fitted]
    mixed: bool
    """Classes have ranks of their own."""

    def settings(self) -> dict[str, Any]:
        """The settings of the run, as those of a configuration file."""
        ways = [own.way for own in self.found.values()]
        numbers = [way.quantization for way in ways]
        shared: dict[str, Any] = {
            "rank": max(way.rank for way in ways),
            "micro_batch_size": min(way.micro_batch_size for way in ways),
            "dtype": ways[0].dtype,
        }
        if (strongest := max(numbers, key=_SMALLER["none"].index)) != "none":
            shared["quantization"] = strongest
        if "" in self.found:
            return {**shared, **self._layers(ways[0])}
        classes = {name: self._of_class(name, own.way) for name, own in self.found.items()}
        return {**shared, "classes": classes}

    def lines(self) -> str:
        """Lines for a configuration file, with comments that say where each of them belongs.

        Tables of classes are whole: they hold what else the settings say of a class.
        """
        settings = self.settings()
        classes = settings.pop("classes", {})
        told = [f"# {name or 'clients'}: {_told(own)}" for name, own in self.found.items()]
        shared = ["# keys of the run, in place of those of these names, above the first [table]:"]
        shared += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        tables: list[str] = []
        if classes:
            tables = [
                "",
                "# whole tables, in place of those of these names, below all keys of the run:",
            ]
        for name, own in classes.items():
            way = self.found[name].way
            tables += [
                f"[classes.{name}]",
                f"# a device of this class that joins a server says these itself: corolla client "
                f"--micro-batch-size {way.micro_batch_size} --quantization {way.quantization}",
                *(f"{key} = {json.dumps(value)}" for key, value in own.items()),
                "",
            ]
        return "\n".join([*told, *shared, *tables]).rstrip()

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "settings": self.settings(),
            "classes": {
                name: {"limits": vars(own.limits), "needs": vars(own.need), **vars(own.way)}
                for name, own in self.found.items()
            },
        }

    def _of_class(self, name: str, way: Way) -> dict[str, Any]:
        """The settings of a class, with those that were chosen in the place of its own."""
        given = self.config.classes[name].model_dump(mode="json", exclude_unset=True)
        said = {key: value for key, value in given.items() if value is not None}
        if own := said.pop("layers", None):
            return {**said, **self._rank(said, way), "layers": self._within(own, way)}
        return {**said, **self._rank(said, way), **self._layers(way)}

    def _rank(self, said: Mapping[str, Any], way: Way) -> dict[str, int]:
        return {"rank": way.rank} if self.mixed or "rank" in said else {}

    def _within(self, own: str, way: Way) -> str:
        """The blocks of a class that has some of the run's: as it says them, or by number."""
        return own if len(self._blocks(own)) == len(way.blocks) else layers.text(way.blocks)

    def _layers(self, way: Way) -> dict[str, str]:
        if len(way.blocks) == len(self._blocks(None)):
            return {"layers": self.config.layers} if "" in self.found and self.config.layers else {}
        if "" in self.found and self.config.layers:
            return {"layers": layers.text(way.blocks)}
        return {"layers": f"last:{len(way.blocks)}"}

    def _blocks(self, own: str | None) -> set[int]:
        """The blocks of the run, or of one of its classes, that has those of the key `layers`."""
        known = self.model.linear(self.config.target_modules, self.config.layers)
        return {place[1] for name in layers.kept(known, own) if (place := units.block(name))}


def fit(config: RunConfig, wanted: Sequence[str]) -> Fit:
    """The best settings within limits, each as `[CLASS:]memory=2GB,bytes=1MB,seconds=60,flops=1e9`.

    Blocks times rank is what is maximised, as nothing is known of the data: of equals the widest
    numbers, then the largest micro-batches are taken. Raises ConfigError where nothing fits, and
    for a run that has no blocks to choose; ModelError for a model of another structure.
    """
    asked = _asked(config, wanted)
    _refuse(config, asked)
    model = anatomy.read(config.model)
    mixed = bool(list(asked) != [""] and build_strategy(config).mixed_ranks)
    speeds = {name: _speed(config, model, name, own) for name, own in asked.items()}
    ranks = [config.rank >> i for i in range(config.rank.bit_length())]
    best: dict[str, Fitted] = {}
    top = 0
    for dtype in dict.fromkeys([config.dtype, "bfloat16"]):
        for rank in [max(ranks)] if mixed else ranks:
            devices = {
                name: device(config, model, name, own, speeds[name]) for name, own in asked.items()
            }
            found = {
                name: _of_class(device, ranks if mixed else [rank], dtype)
                for name, device in devices.items()
            }
            fitting = {name: own for name, own in found.items() if own}
            value = sum(own.way.value * _share(config, name) for name, own in fitting.items())
            if len(fitting) == len(asked) and value > top:
                best, top = fitting, value
    if not best:
        raise ConfigError(_too_little(config, model, asked, speeds))
    return Fit(config, model, best, mixed)


def _of_class(device: Device, ranks: Sequence[int], dtype: str) -> Fitted | None:
    best: Fitted | None = None
    for quantization in _numbers(device.config):
        for rank in ranks:
            found = device.best(rank, dtype, quantization)
            if found and (best is None or found[0].value > best.way.value):
                best = Fitted(device.limits, *found)
    return best


def _numbers(config: RunConfig) -> list[str]:
    """The quantisations that may be tried: those that the settings go with."""
    found: list[str] = [config.quantization]
    for name in _SMALLER[config.quantization][1:]:
        try:
            validate({**config.model_dump(mode="json"), "quantization": name})
            found.append(name)
        except ConfigError:
            continue
    return found


def device(config: RunConfig, model: Anatomy, name: str, limits: Limits, speed: float) -> Device:
    """Devices of a class of a run, at so many operations a second."""
    own = config.classes.get(name, ClientClass())
    rates = (own.upload, own.download)
    traffic = _traffic(config, model, name)
    return Device(model, config.of_class(name), limits, speed, rates, traffic)


def _traffic(config: RunConfig, model: Anatomy, name: str) -> Traffic:
    """Bytes of an update and of a task with its reply, by the formulas of the run's strategy."""

    @cache
    def of(blocks: str | None, rank: int) -> tuple[int, int]:
        own = {"layers": blocks} if name else {}
        whole: dict[str, Any] = {"rank": rank, "ranks": [], "alphas": [], "clients": None}
        whole["classes"] = {name: ClientClass(**own)} if name else {}
        run = config.model_copy(update={**whole, **({} if name else {"layers": blocks})})
        fresh = _fresh(run, model)
        federation = Federation("0" * 32, run, build_strategy(run), {"client": _EXAMPLES}, fresh)
        state = federation.strategy.init(fresh(run.lora), run.seed)
        paid = [costs(federation, state, round, {"client": 1})[0] for round in (1, 2)]
        return max(c.up for c in paid), max(c.up + c.down + c.once for c in paid)

    return lambda own: of(own.layers, own.rank)


def _fresh(run: RunConfig, model: Anatomy) -> Callable[[LoraSpec], Params]:
    @cache
    def fresh(spec: LoraSpec) -> Params:
        own = run.model_copy(update={"rank": spec.rank, "classes": {}})
        shapes = footprint.trained_shapes(model, own)
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    return fresh


# --- what is asked --------------------------------------------------------------------------------


def _asked(config: RunConfig, wanted: Sequence[str]) -> dict[str, Limits]:
    """Class → its limits. Raises ConfigError."""
    found: dict[str, Limits] = {}
    for text in wanted:
        name, _, rest = text.rpartition(":")
        limits = _limits(text, rest)
        if name not in (list(config.classes) or [""]) or text.startswith(":"):
            raise ConfigError(_no_class(config, text, name, rest))
        if name in found:
            raise ConfigError(f"--fit {text}: limits of {name or 'clients'} are given twice")
        found[name] = limits
    return found


def _no_class(config: RunConfig, text: str, name: str, rest: str) -> str:
    """The refusal of limits for a class that the run does not have, or for none of its classes."""
    known = ", ".join(config.classes)
    if not name:
        own = f"classes {known}: name one, as --fit {next(iter(config.classes), '')}:{rest}"
        return f"--fit {text}: the run has " + (own if known else f"no classes: --fit {rest}")
    has = f"it has {known}" if known else f"leave {name}: out where all devices are alike"
    return (
        f"--fit {text}: the run has no class {name}: define it, by a table [classes.{name}] in the "
        f"file or by --set classes.{name}.share=1; {has}"
    )


def _limits(text: str, rest: str) -> Limits:
    given: dict[str, Any] = {}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        if key not in Limits.__annotations__ or key in given:
            names = ", ".join(Limits.__annotations__)
            raise ConfigError(
                f"--fit {text}: expected each of {names} once at most, found {part}: write "
                f"--fit memory=1GB, or of a class --fit phone:memory=1GB"
            )
        try:
            given[key] = parse_bytes(value) if key in ("memory", "bytes") else float(value)
        except ValueError as error:
            raise ConfigError(f"--fit {text}: {key}={value}: {error}") from error
        if not 0 < given[key] < float("inf"):
            raise ConfigError(f"--fit {text}: {key} is more than 0, found {value}")
    return Limits(**given)


def _refuse(config: RunConfig, asked: Mapping[str, Limits]) -> None:
    """Raises ConfigError for a run that has no blocks to choose, or no time without its data."""
    if not config.kind.factors:
        raise ConfigError(
            f"--fit chooses blocks and the rank of LoRA adapters, found "
            f"parameters={config.parameters}: use --memory"
        )
    if config.budgeted or config.ranks or config.rank_pattern or config.alpha_pattern:
        raise ConfigError(
            "--fit chooses what budget, ranks and rank-pattern choose: leave these out"
        )
    if config.new_tokens or config.target_parameters:
        raise ConfigError("--fit is for linear layers: leave new-tokens and target-parameters out")
    if config.dora:
        raise ConfigError("--fit reckons with what LoRA takes, found dora: leave it out")
    if config.task == "classify":
        raise ConfigError(f"--fit is for models that generate, found task={config.task}")
    for name in asked:
        if config.trainer_of(name) == "zeroth_order":
            raise ConfigError(
                f"--fit is for first-order clients, and {name or 'all clients'} train with forward "
                f"passes alone: use --memory"
            )
    if config.local_epochs is not None and any(own.seconds for own in asked.values()):
        raise ConfigError("--fit with seconds needs a number of steps: set local-steps")


def _speed(config: RunConfig, model: Anatomy, name: str, limits: Limits) -> float:
    """Operations a second: as given, else those of this machine times the speed of the class."""
    if limits.flops or limits.seconds is None:
        return limits.flops or 1.0
    batch = Batch(1, config.max_length, config.max_length - 1)
    own = config.classes.get(name, ClientClass())
    return throughput(model, batch, config.threads) * (own.speed or 1.0)


def _share(config: RunConfig, name: str) -> int:
    return config.classes[name].share if name else 1


def _too_little(
    config: RunConfig,
    model: Anatomy,
    asked: Mapping[str, Limits],
    speeds: Mapping[str, float],
) -> str:
    """The first class in which one block of rank 1 exceeds a limit, in one line."""
    for name, limits in asked.items():
        own = device(config, model, name, limits, speeds[name])
        dtype = "float32" if config.dtype == "float32" else config.dtype
        least = [own.least(kind, _numbers(config)[-1]) for kind in {dtype, "bfloat16"}]
        need = min(least, key=lambda need: need.memory)
        if beyond := need.beyond(limits):
            what, most = beyond[0], getattr(limits, beyond[0])
            # An update has the same bytes however long the sequences are.
            shorter = "" if what == "bytes" else f"or lower max-length ({config.max_length}), "
            return (
                f"--fit: nothing fits {name or 'clients'} with {what}={_amount(what, most)}: one "
                f"block of rank 1 takes {_amount(what, getattr(need, what))}, raise it, "
                f"{shorter}or use forward passes, which need less: strategy seed_pool, or mixed "
                f"for some classes alone"
            )
    return "--fit: no rank fits all classes: use a strategy whose clients have ranks of their own"


def _amount(what: str, value: float) -> str:
    return f"{value:.3g} s" if what == "seconds" else human_bytes(int(value))


def _told(own: Fitted) -> str:
    limits = {name: getattr(own.limits, name) for name in ("memory", "bytes", "seconds")}
    return ", ".join(
        f"{name} {_amount(name, getattr(own.need, name))}"
        + (f" of {_amount(name, most)}" if most is not None else "")
        for name, most in limits.items()
        if most is not None or name != "seconds"
    )
