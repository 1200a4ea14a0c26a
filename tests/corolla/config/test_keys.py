"""The reference of all keys, held against the config that it describes."""

import inspect
import pydoc
from typing import Any

import pytest

from corolla.config.keys import CLASSES, OPTIONS, Key, sections, table, titles
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.strategies.listing.registry import STRATEGIES, create

KEYS = table()
RUN = [key for key in KEYS if key.group not in (CLASSES, OPTIONS)]
FIXED = {"fedadagrad.beta2", "fedsvd.train"}
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
    assert rule == f"{first}, or {zeroth} where all clients are zeroth order"


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_the_signature_of_a_run_shows_the_default_in_effect(name: str) -> None:
    parameter = inspect.signature(RunConfig).parameters[name]
    (key,) = (key for key in RUN if key.name == name)
    assert parameter.default == getattr(RunConfig(), name) or repr(parameter.default) == (
        f"<{key.usual}>"
    )
    assert parameter.default not in (None, "auto")
    assert "FieldInfo" not in str(parameter)


def test_the_signature_of_a_class_of_clients_shows_the_default_in_effect() -> None:
    shown = str(inspect.signature(ClientClass))
    assert "(*, share: int = 1, trainer: " in shown
    assert "local_steps: int | None = <the run's>" in shown


def test_help_shows_defaults_in_effect() -> None:
    told = pydoc.plain(pydoc.render_doc(RunConfig))
    assert "cohort: int | None = <8, or all clients where there are fewer>" in told
    assert "rounds: int = 5, " in told


def test_to_give_what_the_signature_shows_is_to_give_nothing() -> None:
    """Of runs that fit other defaults, too: the learning rate goes by the strategy."""
    shown = {name: own.default for name, own in inspect.signature(RunConfig).parameters.items()}
    assert RunConfig(**shown) == RunConfig()
    changed = {"strategy": "seed_pool", "model": "some/model", "parameters": "full"}
    assert RunConfig(**{**shown, **changed}) == RunConfig.model_validate(changed)
    of_class = {n: own.default for n, own in inspect.signature(ClientClass).parameters.items()}
    assert ClientClass(**of_class) == ClientClass()
    assert RunConfig(classes={"phone": of_class}) == RunConfig(classes={"phone": {}})
