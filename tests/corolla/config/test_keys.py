"""The reference of all keys, held against the config that it describes."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from corolla.config.groups import ClientClass
from corolla.config.keys import CLASSES, OPTIONS, Key, kind_of, sections, table, titles, written
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.strategies.registry import STRATEGIES, create

KEYS = table()
RUN = [key for key in KEYS if key.group not in (CLASSES, OPTIONS)]
FIXED = {"fedadagrad.beta2"}
"""Keys with one value."""

by_name = pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)


def test_every_field_is_a_key_in_the_order_of_the_config() -> None:
    assert [key.name for key in RUN] == list(RunConfig.model_fields)
    of_classes = [key.name for key in KEYS if key.group == CLASSES]
    assert of_classes == [f"classes.NAME.{name}" for name in ClientClass.model_fields]
    assert len({key.name for key in KEYS}) == len(KEYS)


def test_every_option_of_a_strategy_is_a_key() -> None:
    options = {key.name: key.default for key in KEYS if key.group == OPTIONS}
    made = {name: vars(create(name)) for name in STRATEGIES}
    assert options == {f"{name}.{o}": v for name, own in made.items() for o, v in own.items()}


def test_groups_are_the_sections_of_the_config() -> None:
    assert list(titles()) == list(dict.fromkeys(key.group for key in KEYS))
    assert [key.group for key in RUN if key.name in ("lr", "rank", "epsilon", "threads")] == [
        "adapter",
        "training",
        "privacy",
        "machine",
    ]
    assert all(titles().values())
    assert list(sections()) == list(titles())[:-2]


@by_name
def test_every_key_has_a_sentence_and_an_example(key: Key) -> None:
    assert key.text[0].isupper()
    assert key.text[-1] == "."
    assert key.group in titles()
    assert key.kind
    assert key.usual
    assert key.example is not None
    assert (key.example == key.default) is (key.name in FIXED)


@by_name
def test_the_example_of_every_key_is_accepted(key: Key) -> None:
    load(None, {}, list(key.settings))


@by_name
def test_what_a_key_excludes_is_refused(key: Key) -> None:
    assert "" not in key.refusals().values()


@pytest.mark.parametrize("key", RUN, ids=lambda key: key.name)
def test_the_default_is_that_of_an_empty_config_unless_a_rule_says_more(key: Key) -> None:
    found = getattr(RunConfig(), key.name)
    assert found == key.default or key.effect
    assert key.default not in (None, [], {}, "auto") or key.effect or key.name == "options"


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        *(("fedavg", name) for name in ("lora", "ia3", "prompt", "full")),
        *(("seed_pool", name) for name in ("lora", "full")),
    ],
)
def test_the_rule_of_the_learning_rate_has_the_rates_of_runs(
    strategy: str, parameters: Any
) -> None:
    (rule,) = (key.usual for key in RUN if key.name == "lr")
    embedded, other = (
        RunConfig(strategy=strategy, parameters=parameters, model=model).lr
        for model in ("embedded", "some/model")
    )
    assert f"{other:g} ({embedded:g}" in rule


def test_the_rule_of_local_steps_has_those_of_runs() -> None:
    (rule,) = (key.usual for key in RUN if key.name == "local_steps")
    zeroth, first = RunConfig(strategy="seed_pool").local_steps, RunConfig().local_steps
    assert rule == f"{zeroth} where all clients are zeroth order, else {first}"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (str | None, "text, or null"),
        (Annotated[int, Field(ge=1)] | None, "whole number from 1, or null"),
        (Annotated[float, Field(gt=0, lt=1)], "number above 0 below 1"),
        (Annotated[float, Field(ge=0, le=2.5)], "number from 0 to 2.5"),
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
