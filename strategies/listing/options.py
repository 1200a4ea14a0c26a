"""Options of strategies: the fields of their dataclasses, each with what it says of itself."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def option(
    default: Any, text: str, example: Any, beside: Mapping[str, object] | None = None
) -> Any:
    """A field of a strategy: what it is in a sentence, and a value other than the default.

    `beside` are options without which the example has no effect. An example that equals the default
    says that there is no other value.
    """
    known = {"text": text, "example": example, "beside": dict(beside or {})}
    return dataclasses.field(default=default, metadata=known)


def types(cls: type) -> Mapping[str, Any]:
    """The types of a strategy's options by name; none where they cannot be read."""
    try:
        return typing.get_type_hints(cls)
    except NameError:  # an annotation that only a type checker imports
        return {}


def misfit(kind: Any, value: object) -> str:
    """Names the values of a plain type; "" if `value` is one of them, or the type is not plain.

    Plain are numbers, truth values and lists of words. What else it asks of its values a strategy
    says by itself.
    """
    if typing.get_origin(kind) is Sequence:
        words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        return "" if words else "a list of words"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is int:
        return "" if number and isinstance(value, int) else "a whole number"
    return "a number" if kind is float and not (number and value == value) else ""
