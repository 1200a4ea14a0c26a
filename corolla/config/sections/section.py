"""The base class of all groups of settings, and the types and functions that they share."""

import inspect
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from corolla.host import wording
from corolla.wire.ranges import RANGES

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

_SOME = r"((first|last):[1-9]\d{0,3}|\d{1,4}(-\d{1,4})?)"
_LAYERS = re.compile(rf"{_SOME}(,{_SOME})*")


def _layers(text: str) -> str:
    if not _LAYERS.fullmatch(text):
        raise ValueError("expected blocks such as last:4, first:2,last:2 or 0,3,17-23")
    return text


Layers = Annotated[str, Field(coerce_numbers_to_str=True), AfterValidator(_layers)]
"""Blocks of a model, as corolla/models/layers.py reads them."""

_BUDGET = re.compile(r"(flops|bytes|memory):(0?\.\d{1,6}|1|1\.0)")


def _budget(text: str) -> str:
    if not _BUDGET.fullmatch(text) or not float(text.partition(":")[2]):
        raise ValueError("expected a share of what training everything takes, such as flops:0.5")
    return text


Budget = Annotated[str, AfterValidator(_budget)]
"""A share of operations, bytes or memory, as corolla/budgets reads it."""


class Section(BaseModel):
    """Settings that cannot be changed, and have no others beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        """The signature, which help() and editors show, tells what holds without a key."""
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=InEffect(told) if (told := wording.effect(field)) else field.default,
                annotation=wording.plain(field.annotation),
            )
            for name, field in cls.model_fields.items()
        ]
        cls.__signature__ = inspect.Signature(parameters)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        return given(values)


class InEffect:
    """The default in effect of a key, in words; to give it is to leave the key out."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return f"<{self.words}>"


def given(values: Any) -> Any:
    """Values without those that say what holds where the key is left out."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if not isinstance(value, InEffect)}


def within(name: str) -> Any:
    """The bounds of a number that a server chooses for its clients, for an annotation."""
    return Field(ge=RANGES[name].least, le=RANGES[name].most)


def key(
    default: Any,
    text: str,
    example: Any,
    *,
    effect: str = "",
    beside: str = "",
    against: tuple[str, ...] = (),
    unsaid: bool = False,
) -> Any:
    """A field that explains itself: all that `corolla keys` prints of a key stands here.

    `text` is a sentence; `effect` says which value a run takes by itself where that is not the
    default. `beside` are other settings that the example needs, KEY=VALUE with spaces between
    them; with each of `against` the example is refused. `unsaid`: the default is left out of
    what is stored and sent, so that whoever does not know the key can do without.
    """
    about: dict[str, Any] = {"effect": effect, "beside": beside, "against": list(against)}
    without = (lambda value: value == default) if unsaid else None
    return Field(
        default, description=text, examples=[example], json_schema_extra=about, exclude_if=without
    )
