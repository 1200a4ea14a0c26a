"""All keys of a run, read from the fields themselves: what each is, by default, and excludes."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.section import Section
from corolla.config.sections.settings import Settings
from corolla.errors import ConfigError
from corolla.host.wording import kind_of, written
from corolla.strategies.listing.registry import STRATEGIES

CLASSES, OPTIONS = "classes", "strategies"
"""Groups of keys that are no section of RunConfig: of classes of clients, of strategies."""

NAME = "NAME"
"""Stands for the name of a class of clients in the names of keys."""

_CLASS = "phone"
"""The class of clients in examples."""


@dataclass(frozen=True)
class Key:
    """One key. `settings` are those of its example, in the form of --set KEY=VALUE.

    `effect` says what holds where the key is not given and `default` does not tell; with each of
    `against`, settings too, the example is refused.
    """

    name: str
    group: str
    kind: str
    default: Any
    text: str
    example: Any
    settings: tuple[str, ...]
    effect: str = ""
    against: tuple[str, ...] = ()

    @property
    def usual(self) -> str:
        """The default in effect, in words."""
        return self.effect or written(self.default)

    def refusals(self) -> dict[str, str]:
        """Settings that the example is refused with → the sentence which says why."""
        return {other: _refusal([*self.settings, *other.split()]) for other in self.against}

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, with what is refused and why."""
        known = {"name": self.name, "group": self.group, "type": self.kind, "default": self.default}
        return {
            **known,
            "in_effect": self.usual,
            "text": self.text,
            "example": self.example,
            "settings": list(self.settings),
            "refused": self.refusals(),
        }


def sections() -> dict[str, type[Section]]:
    """Group → the section of RunConfig whose fields are its keys, in the order of the keys."""
    bases = [base for base in RunConfig.__mro__ if issubclass(base, Section)]
    own = [base for base in reversed(bases) if base not in (Section, Settings, RunConfig)]
    found = {base.__name__.lower(): base for base in own}
    order = list(RunConfig.model_fields)
    return dict(sorted(found.items(), key=lambda item: order.index(_own(item[1])[0])))


def titles() -> dict[str, str]:
    """Group → what it is, in a sentence."""
    known = {**sections(), CLASSES: ClientClass}
    about = {group: (section.__doc__ or "").partition("\n")[0] for group, section in known.items()}
    return {**about, OPTIONS: "Options of single strategies, which no other strategy takes."}


def table() -> list[Key]:
    """All keys in the order of their groups."""
    found = [
        _of_field(name, group, RunConfig.model_fields[name], name)
        for group, section in sections().items()
        for name in _own(section)
    ]
    for name, field in ClientClass.model_fields.items():
        key = f"classes.{NAME}.{name}"
        found.append(_of_field(key, CLASSES, field, key.replace(NAME, _CLASS)))
    return [*found, *_of_strategies()]


def _own(section: type[Section]) -> list[str]:
    """The fields that a section adds to those of its bases."""
    return [name for name in RunConfig.model_fields if name in section.__annotations__]


def _of_field(name: str, group: str, field: FieldInfo, setting: str) -> Key:
    about = field.json_schema_extra
    known: Mapping[str, Any] = about if isinstance(about, dict) else {}
    example = (field.examples or [None])[0]
    return Key(
        name=name,
        group=group,
        kind=kind_of(field.annotation, tuple(field.metadata)),
        default=field.get_default(call_default_factory=True),
        text=field.description or "",
        example=example,
        settings=(*known.get("beside", "").split(), f"{setting}={written(example)}"),
        effect=known.get("effect", ""),
        against=tuple(known.get("against", ())),
    )


def _of_strategies() -> Iterator[Key]:
    """Options that strategies declare, each as STRATEGY.OPTION."""
    for strategy, cls in STRATEGIES.items():
        needed = [f"classes.{how}.trainer={how}" for how in cls.trainers] * (len(cls.trainers) > 1)
        declared: Any = cls  # a dataclass, which the protocol does not say
        for field in dataclasses.fields(declared):
            example = field.metadata.get("example")
            beside = field.metadata.get("beside", {}).items()
            chosen = [*beside, (field.name, example)]
            own = [f"{strategy}.{name}={written(value)}" for name, value in chosen]
            yield Key(
                name=f"{strategy}.{field.name}",
                group=OPTIONS,
                kind=kind_of(field.type),
                default=field.default,
                text=field.metadata.get("text", ""),
                example=example,
                settings=(f"strategy={strategy}", *needed, *own),
            )


def _refusal(settings: list[str]) -> str:
    """The sentence with which settings are refused; "" if they are not."""
    try:
        load(None, {}, settings)
    except ConfigError as error:
        return str(error)
    return ""
