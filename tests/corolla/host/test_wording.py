"""Fields in words, and the values of keys."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from corolla.config.sections.groups import ClientClass
from corolla.config.sections.settings import Settings
from corolla.host.wording import entry, expected, kind_of, plain, read, shown, told, written

Positive = Annotated[int, Field(ge=1)]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (str | None, "text, or null"),
        (Annotated[int, Field(ge=1)] | None, "whole number from 1, or null"),
        (Annotated[float, Field(gt=0, lt=1)], "number above 0 below 1"),
        (Annotated[float, Field(ge=0, le=2.5)], "number from 0 to 2.5"),
        (Annotated[float, Field(gt=0, le=1)], "number above 0, up to 1"),
        (Annotated[int, Field(ge=0, lt=2**63)], "whole number from 0 below 2**63"),
        (Literal["a", "b"], "a, b"),
        (list[Annotated[int, Field(ge=1)]], "list (whole number from 1)"),
        (list[str] | None, "list (text), or null"),
        (dict[str, int], "table"),
    ],
)
def test_types_are_said_in_words(annotation: object, words: str) -> None:
    assert kind_of(annotation) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (1e-5, "1e-05"), (None, "null"), (True, "true"), ([4, 8], "[4,8]"), ({}, "{}")],
)
def test_values_are_written_as_set_takes_them(value: object, text: str) -> None:
    assert written(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.5", 0.5), ("[4,8]", [4, 8]), ("null", None), ("true", True), (" a b ", "a b")],
)
def test_a_value_is_read_as_it_is_written(text: str, value: object) -> None:
    assert read(text) == value
    assert read(written(value)) == value


@pytest.mark.parametrize(
    ("annotation", "type_"),
    [
        (Positive | None, int | None),
        (list[Positive], list[int]),
        (list[Annotated[float, Field(gt=0)]] | None, list[float] | None),
        (dict[str, ClientClass], dict[str, ClientClass]),
        (Literal["a", "b"], Literal["a", "b"]),
    ],
)
def test_a_signature_tells_types_without_bounds(annotation: object, type_: object) -> None:
    assert plain(annotation) == type_


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("rounds", "expected a whole number from 1 to 100000"),
        ("eval_fraction", "expected a number above 0 below 1"),
        ("cohort", "expected a whole number from 1, or null"),
        ("dp", "expected one of none, example, client"),
        ("rslora", "expected true or false"),
        ("model", "expected text"),
        ("ranks", "expected a list such as [4,8]"),
        ("target_modules", 'expected a list such as ["q_proj","v_proj"], or null'),
        ("options", 'expected a table such as {"residual_rank":8}'),
    ],
)
def test_what_a_key_takes_is_said_in_words(key: str, words: str) -> None:
    assert expected(Settings.model_fields[key]) == words


def test_what_an_entry_takes_is_said_in_words() -> None:
    fields = Settings.model_fields
    assert expected(entry(fields["ranks"], "0")) == "expected a whole number from 1 to 65536"
    of_class = entry(fields["classes"], "phone")
    assert expected(of_class) == 'expected a table such as {"share":2,"lr":0.001}'
    assert expected(entry(of_class, "lr")) == "expected a number from 1e-30 to 1e+06, or null"


def test_null_is_said_only_where_it_can_be_given() -> None:
    fields = {"count": FieldInfo.from_annotation(Positive | None)}  # type: ignore[arg-type]
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, Positive]).validate_python({"count": 0})
    (error,) = caught.value.errors()
    assert told(error, fields) == "expected a whole number from 1, or null, found 0"
    assert told(error, fields, null=False) == "expected a whole number from 1, found 0"


def test_a_long_value_is_not_repeated_in_full() -> None:
    assert shown("a" * 98) == repr("a" * 98)
    assert shown("a" * 99) == "'" + "a" * 98 + "…"
