"""Fields in words: what a key takes, and how a value of it is written."""

import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_WORDS = {bool: "true or false", str: "text", Path: "path"}
"""Types in words; numbers have bounds besides."""
_NULL = ", or null"
_LONGEST = 100
"""Characters of a wrong value that are repeated at most."""


def written(value: Any) -> str:
    """A value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def read(text: str) -> Any:
    """A value as TOML or JSON would read it; anything else is a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def effect(field: FieldInfo) -> str:
    """Returns in words what a run takes by itself; "" where the default of the field holds."""
    about = field.json_schema_extra
    return str(about.get("effect", "")) if isinstance(about, dict) else ""


def usual(field: FieldInfo) -> str:
    """The default in effect, in words."""
    return effect(field) or written(field.get_default(call_default_factory=True))


def kind_of(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    """A type in words, with the bounds of numbers: "whole number from 1, or null"."""
    form, inner = get_origin(annotation), get_args(annotation)
    if form is Annotated:
        nested = [b for bound in inner[1:] for b in getattr(bound, "metadata", [bound])]
        return kind_of(inner[0], (*bounds, *nested))
    if form in (Union, UnionType):
        rest = [kind_of(part, bounds) for part in inner if part is not NoneType]
        return " or ".join(rest) + (_NULL if NoneType in inner else "")
    if form is Literal:
        return ", ".join(str(value) for value in inner)
    if form in (list, Sequence):
        return f"list ({kind_of(inner[0])})"
    if form is dict or _is_group(annotation):
        return "table"
    return _WORDS.get(annotation) or _number(annotation, bounds)


def plain(annotation: Any) -> Any:
    """A type without bounds, as a signature tells it: int | None, list[int]."""
    form, inner = get_origin(annotation), get_args(annotation)
    if form is Annotated:
        return plain(inner[0])
    if form in (Union, UnionType):
        return functools.reduce(operator.or_, map(plain, inner))
    return form[tuple(map(plain, inner))] if form in (list, dict) else annotation


def parts(annotation: Any) -> list[Any]:
    """The types of which a value has one, None left out: int of `Annotated[int, …] | None`."""
    form, inner = get_origin(annotation), get_args(annotation)
    if form in (Union, UnionType):
        return [found for part in inner if part is not NoneType for found in parts(part)]
    return parts(inner[0]) if form is Annotated else [annotation]


def entry(field: FieldInfo, name: str) -> FieldInfo:
    """The field of an entry: of a list, of a table, or of a group of keys."""
    (whole,) = parts(field.annotation)
    if _is_group(whole):
        found: FieldInfo = whole.model_fields[name]
        return found
    example = (field.examples or [None])[0]
    values = list(example.values()) if isinstance(example, dict) else example
    made = FieldInfo.from_annotation(get_args(whole)[-1])
    made.examples = values[:1] if values else None
    return made


def within(field: FieldInfo, path: Iterable[str]) -> FieldInfo:
    """The field that a path leads to, from entry to entry."""
    return functools.reduce(entry, path, field)


def told(error: ErrorDetails, fields: Mapping[str, FieldInfo], null: bool = True) -> str:
    """Returns the words for a refused value: what its field should have been, and what was found.

    Without `null` nothing is said of null, which TOML and options do not have.
    """
    if error["type"] == "value_error":
        asked = str(error["msg"]).removeprefix("Value error, ")
    else:
        first, *rest = map(str, error["loc"])
        asked = expected(within(fields[first], rest))
        asked = asked if null else asked.removesuffix(_NULL)
    return f"{asked}, found {shown(error['input'])}"


def expected(field: FieldInfo) -> str:
    """The words `expected a whole number from 1, or null`; of lists and tables with an example."""
    (whole, *_), null = parts(field.annotation), NoneType in get_args(field.annotation)
    kind = kind_of(field.annotation, tuple(field.metadata))
    if get_origin(whole) is list or get_origin(whole) is dict or _is_group(whole):
        such = f" such as {written(field.examples[0])}" if field.examples else ""
        kind = ("a list" if get_origin(whole) is list else "a table") + such
        kind += _NULL if null else ""
    elif get_origin(whole) is Literal:
        kind = f"one of {kind}"
    elif whole in (int, float, Path):
        kind = f"a {kind}"
    return f"expected {kind}"


def shown(value: object) -> str:
    """A wrong value as it is repeated to its author."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _number(annotation: type, bounds: tuple[Any, ...]) -> str:
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    limits = {
        word: getattr(b, name) for b in bounds for name, word in words.items() if _has(b, name)
    }
    if {"above", "to"} <= limits.keys():
        limits[", up to"] = limits.pop("to")
    said = "".join(f" {word} {_limit(limit)}" for word, limit in limits.items())
    said = said.replace(" ,", ",")
    return ("whole number" if annotation is int else "number") + said


def _limit(limit: float) -> str:
    if isinstance(limit, int):
        return f"2**{limit.bit_length() - 1}" if limit >= 2**31 else str(limit)
    return f"{limit:g}"


def _has(bound: Any, name: str) -> bool:
    return getattr(bound, name, None) is not None
