"""Settings without effect: away from their defaults, and read by no part of the run.

They are told, not refused: what several strategies are given in common, as in a comparison, need
not mean something to each of them. What would be unsafe, or mean something else than it says, is
refused by the rules of corolla.config.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from corolla.config.run import RunConfig
from corolla.config.sections import learning_rates
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.rule import Rule
from corolla.interfaces import Stacking, Traits
from corolla.strategies.listing import registry
from corolla.types import TrainerName


@dataclass(frozen=True)
class Reader:
    """The run, or the clients of one of its classes, as a reader of settings."""

    config: RunConfig
    deployed: bool = False
    """True where clients are devices of their own, and the run is that of `corolla server`."""
    kind: str = ""
    """The name of the class; "" for the whole run."""

    @cached_property
    def traits(self) -> Traits:
        """The traits that the strategy declares."""
        return registry.traits(registry.find(self.config.strategy))

    @cached_property
    def trainers(self) -> set[TrainerName]:
        """How its clients train."""
        classes = [self.kind] if self.kind else list(self.config.classes) or [""]
        return {self.config.trainer_of(name) for name in classes}

    @property
    def distant(self) -> bool:
        """True where answers come over Flower, at a time of their own."""
        return self.deployed or self.config.engine == "flower"

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the run."""
        return math.ceil(self.config.rounds / self.config.eval_every)

    def overridden(self, key: str) -> bool:
        """Returns whether there are classes and every one gives its own value of a key."""
        classes = [] if self.kind else self.config.classes.values()
        return bool(classes) and all(getattr(own, key) is not None for own in classes)


def _unless(
    reads: Callable[[Reader], object], why: str | Callable[[Reader], str], instead: str
) -> Rule[Reader]:
    """A rule that applies where the run does not read a setting."""
    said = why if callable(why) else lambda reader: why
    return Rule(when=lambda reader: not reads(reader), why=said, instead=instead)


_LEAVE = "leave it out"
_FORWARD = _unless(
    lambda reader: "zeroth_order" in reader.trainers,
    lambda reader: f"it is for zeroth-order clients, and those of {_subject(reader)} backpropagate",
    "leave it out, or use seed_pool or another strategy of forward passes",
)
_BACKWARD = _unless(
    lambda reader: "first_order" in reader.trainers,
    lambda reader: (
        f"it is for first-order clients, and those of {_subject(reader)} do not backpropagate"
    ),
    _LEAVE,
)
_ADAPTER = _unless(
    lambda reader: reader.config.kind.factors,
    lambda reader: f"it is for adapters, and parameters={reader.config.parameters} has none",
    "leave it out, or use parameters=lora",
)
_COUNTED = _unless(
    lambda reader: reader.config.kind.factors or reader.config.kind.sparse,
    lambda reader: f"it is for adapters, and parameters={reader.config.parameters} has none",
    "leave it out, or use parameters=lora",
)
_MEASURED = _unless(
    lambda reader: reader.config.dp == "none" and not reader.config.secure_sum,
    lambda reader: (
        "with "
        + ("secure-sum=true" if reader.config.secure_sum else f"dp={reader.config.dp}")
        + " nothing is measured on clients' examples"
    ),
    _LEAVE,
)
_CLIENTS = _unless(
    lambda reader: reader.config.eval_clients,
    "eval-clients=0 measures on no client",
    "leave it out, or raise eval-clients",
)
_DISTANT = _unless(
    lambda reader: reader.distant,
    "in this process every client answers at once",
    "leave it out, or use engine=flower or corolla server",
)
_STEPS = _unless(
    lambda reader: reader.config.local_epochs is None,
    lambda reader: f"local-epochs={reader.config.local_epochs} decides how many steps there are",
    "give one of them",
)


def _of_classes(key: str) -> Rule[Reader]:
    return _unless(
        lambda reader: not reader.overridden(key),
        "every class of clients has its own",
        "leave it out, or take it out of a class",
    )


EFFECTS: Mapping[str, tuple[Rule[Reader], ...]] = {
    **dict.fromkeys(("queries", "eps"), (_FORWARD,)),
    "estimator": (_FORWARD,),
    **dict.fromkeys(("optimizer", "weight_decay", "gradient_checkpointing"), (_BACKWARD,)),
    "clip_norm": (
        _BACKWARD,
        _unless(
            lambda reader: reader.config.dp != "example",
            "dp=example clips each example's gradient to clip, and nothing after that",
            "leave it out, or set clip",
        ),
    ),
    "local_steps": (_STEPS, _of_classes("local_steps")),
    **{key: (_of_classes(key),) for key in ("lr", "batch_size")},
    "rank": (
        _COUNTED,
        _unless(lambda reader: not reader.config.ranks, "ranks has those of all clients", _LEAVE),
        _of_classes("rank"),
    ),
    "alpha": (
        _ADAPTER,
        _unless(lambda reader: not reader.config.alphas, "alphas has those of all clients", _LEAVE),
        _of_classes("alpha"),
    ),
    "rslora": (_ADAPTER,),
    "served_rank": (_ADAPTER,),
    "max_rank": (
        _unless(
            lambda reader: issubclass(registry.find(reader.config.strategy), Stacking),
            lambda reader: f"the state of {_subject(reader)} has a rank that does not grow",
            "leave it out, or use a strategy that stacks factors, such as flora",
        ),
    ),
    "dropout": (_BACKWARD, _ADAPTER),
    "public_examples": (
        _unless(
            lambda reader: reader.config.begins.rows or reader.config.public,
            lambda reader: f"no public rows are read with start={reader.config.start}",
            "leave it out, or use start=gradient",
        ),
    ),
    "spectrum": (
        _unless(
            lambda reader: reader.config.select == "principal",
            lambda reader: f"select={reader.config.select} looks at whole matrices or at none",
            "leave it out, or use select=principal",
        ),
    ),
    "virtual_tokens": (
        _unless(
            lambda reader: reader.config.kind.virtual_tokens,
            lambda reader: f"parameters={reader.config.parameters} has no virtual tokens",
            "leave it out, or use parameters=prompt",
        ),
    ),
    "subset": (
        _unless(
            lambda reader: not Path(reader.config.data).exists(),
            "only a set of the hub has configurations",
            _LEAVE,
        ),
    ),
    "partition_alpha": (
        _unless(
            lambda reader: reader.config.partition == "dirichlet",
            lambda reader: f"it is for partition=dirichlet, found {reader.config.partition}",
            "leave it out, or set partition=dirichlet",
        ),
    ),
    "shards_per_client": (
        _unless(
            lambda reader: reader.config.partition == "shards",
            lambda reader: f"it is for partition=shards, found {reader.config.partition}",
            "leave it out, or set partition=shards",
        ),
    ),
    "pooled": (
        _unless(
            lambda reader: not reader.deployed,
            "rows of devices stay where they are",
            "leave it out, or use corolla simulate",
        ),
    ),
    "staleness_power": (
        _unless(
            lambda reader: reader.config.buffer,
            "no update is late in synchronous rounds",
            "leave it out, or set buffer",
        ),
    ),
    "robust_space": (
        _unless(
            lambda reader: reader.config.robust != "none",
            "robust=none compares no updates",
            "leave it out, or name a rule with robust",
        ),
    ),
    "deadline": (_DISTANT,),
    "wait": (_DISTANT,),
    "max_examples": (
        _unless(
            lambda reader: reader.deployed,
            "it is for devices that say how many examples they have",
            "leave it out, or use corolla server",
        ),
    ),
    "engine": (
        _unless(
            lambda reader: not reader.deployed,
            "clients of corolla server run on their devices",
            "leave it out, or use corolla simulate",
        ),
    ),
    "patience": (
        _unless(
            lambda reader: (reader.config.patience or 0) < reader.evaluations,
            lambda reader: f"the run has no more than {reader.evaluations} evaluations",
            "lower it",
        ),
    ),
    "eval_clients": (_MEASURED,),
    "eval_client_examples": (_MEASURED, _CLIENTS),
    "eval_participants": (
        _MEASURED,
        _CLIENTS,
        _unless(
            lambda reader: not reader.traits.personal,
            lambda reader: f"{_subject(reader)} always measures on clients that train",
            _LEAVE,
        ),
    ),
    "share": (
        _unless(
            lambda reader: len(reader.config.classes) > 1,
            "all clients are of the only class",
            "leave it out, or add another class",
        ),
    ),
    **dict.fromkeys(
        ("fedmezo.lozo_rank", "fedmezo.interval"),
        (
            _unless(
                lambda reader: reader.config.options.get("directions") == "low_rank",
                "it is for directions of low rank",
                "leave it out, or set fedmezo.directions=low_rank",
            ),
        ),
    ),
    "regrow": (
        _unless(
            lambda reader: (reader.config.regrow or 0) < reader.config.rounds,
            "no round follows in which other places would be trained",
            "leave it out, or take more rounds",
        ),
    ),
    "max_new_tokens": (
        _unless(
            lambda reader: reader.config.answer != "none",
            "answer=none has the model write no answers to compare",
            "leave it out, or set answer",
        ),
    ),
}
"""Key, also of a class of clients or STRATEGY.OPTION → the rules that say where it is not read.

Of several that apply the first is told.

A key without a line is read by every run that takes it.
"""


@dataclass(frozen=True)
class Idle:
    """One setting that a run does not read."""

    key: str
    setting: str
    """The setting as it would be given."""
    why: str
    instead: str


def without_effect(config: RunConfig, deployed: bool = False) -> Iterator[Idle]:
    """Every setting that is away from its default and that a run does not read.

    `deployed`: the run is that of `corolla server`.
    """
    usual, whole = _defaults(config), Reader(config, deployed)
    for key in [key for key in EFFECTS if key in usual]:
        if (value := getattr(config, key)) != usual[key]:
            yield from _told(key, key.replace("_", "-"), value, whole)
    for option, value in config.options.items():
        key = f"{config.strategy}.{option}"
        yield from _told(key, key, value, whole)
    for name, own in config.classes.items():
        reader = Reader(config, deployed, name)
        for key, value in own:
            if value != ClientClass.model_fields[key].default:
                yield from _told(key, f"classes.{name}.{key}", value, reader)


def _told(key: str, name: str, value: object, reader: Reader) -> Iterator[Idle]:
    """Yields the Idle of the first rule of a key that applies; nothing where none does."""
    for rule in EFFECTS.get(key, ()):
        if rule.when(reader):
            yield Idle(key, f"{name}={value}", rule.why(reader), str(rule.instead))
            return


def _defaults(config: RunConfig) -> dict[str, Any]:
    """The value that each key has where it is not given."""
    fields = RunConfig.model_fields.items()
    found = {key: field.get_default(call_default_factory=True) for key, field in fields}
    clip = {"clip_norm": None} if config.dp == "example" else {}
    given = {"model": config.model, "parameters": config.parameters}
    trainer = registry.find(config.strategy).trainers[0]
    return {**found, **clip, **learning_rates.defaults(given, trainer)}


def _subject(reader: Reader) -> str:
    return (
        f"class {reader.kind}"
        if reader.kind
        else f"strategy {registry.label(reader.config.strategy)}"
    )
