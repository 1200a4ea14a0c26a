"""What is said of wrong keys and values, on the command line and in code."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from corolla.config.mistakes import MEANINGS, meant, unknown
from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.settings import Settings
from corolla.errors import ConfigError
from tests.corolla.config.configs import refused

OPTIONS = ("--out", "--track")
"""Options of commands that are no keys."""


def test_what_other_tools_call_a_key_leads_to_one_that_exists() -> None:
    known = {*RunConfig.model_fields, *OPTIONS}
    assert {name: key for name, key in MEANINGS.items() if key not in known} == {}
    assert MEANINGS.keys() & RunConfig.model_fields.keys() == set()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("grad_clip", "clip_norm"),
        ("max_grad_norm", "clip_norm"),
        ("epochs", "local_epochs"),
        ("batch", "batch_size"),
        ("lora_r", "rank"),
        ("lora_alpha", "alpha"),
        ("num_rounds", "rounds"),
        ("num_clients", "clients"),
        ("clients_per_round", "cohort"),
        ("fraction_fit", "cohort"),
        ("steps", "local_steps"),
        ("adam", "optimizer"),
        ("random_seed", "seed"),
        ("model_name_or_path", "model"),
        ("dataset", "data"),
        ("noise", "noise_multiplier"),
        ("test_size", "eval_fraction"),
        ("cuda", "device"),
        ("output", "--out"),
        ("local_step", "local_steps"),
    ],
)
def test_an_unknown_key_is_answered_by_meaning_before_spelling(
    tmp_path: Path, name: str, key: str
) -> None:
    told = refused(tmp_path, settings=[f"{name}=3"])
    assert told.endswith(f"in --set: did you mean {key!r}?")
    assert told.endswith(meant(name, RunConfig.model_fields))


def test_a_class_of_clients_is_told_its_own_keys_alone(tmp_path: Path) -> None:
    assert meant("learning_rate", ClientClass.model_fields) == "did you mean 'lr'?"
    assert "local_epochs" not in meant("epochs", ClientClass.model_fields)
    assert "'lr'" in refused(tmp_path, settings=["classes.phone.learning-rate=3"])


def test_where_nothing_is_near_a_few_keys_are_named_and_many_are_not() -> None:
    assert str(unknown("zzz", ["lr", "rank"], "x.toml")) == (
        "unknown key 'zzz' in x.toml; known keys are lr, rank"
    )
    assert str(unknown("zzz", RunConfig.model_fields)) == (
        "unknown key 'zzz': no key is like it, corolla keys lists all"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"round": 2}, "unknown key 'round': did you mean 'rounds'?"),
        ({"learning_rate": 1.0}, "unknown key 'learning_rate': did you mean 'lr'?"),
        ({"mu": 1}, "unknown key 'mu': did you mean 'mu' in options, an option of fedprox?"),
        (
            {"classes": {"phone": {"steps": 2}}},
            "unknown key 'steps' in classes.phone: did you mean 'local_steps'?",
        ),
        (
            {"strategy": "fedav"},
            "unknown strategy 'fedav': did you mean 'fedavg'? Your own is module:Class or "
            "FILE.py:Class",
        ),
        ({"rounds": 0}, "rounds: expected a whole number from 1 to 100000, found 0"),
        ({"lr": -1}, "lr: expected a number from 1e-30 to 1e+06, found -1"),
        ({"eval_fraction": 2}, "eval-fraction: expected a number above 0 below 1, found 2"),
        ({"dp": "all"}, "dp: expected one of none, example, client, found 'all'"),
        ({"rslora": 3}, "rslora: expected true or false, found 3"),
        ({"seed": 2**63}, f"seed: expected a whole number from 0 below 2**63, found {2**63}"),
        ({"ranks": [4, 0]}, "ranks.1: expected a whole number from 1 to 65536, found 0"),
        ({"options": {1: 2}}, "options: expected keys that are text, found 1"),
        ({"classes": {2: {}}}, "classes: expected keys that are text, found 2"),
        (
            {"classes": {"a_b": {"local_steps": 0}}},
            "classes.a_b.local-steps: expected a whole number from 1 to 100000, or null, found 0",
        ),
        (
            {"classes": {"a_b": 3}},
            'classes.a_b: expected a table such as {"share":2,"lr":0.001}, found 3',
        ),
        ({"cohort": 3, "clients": 2}, "cohort 3 is larger than clients 2"),
        ({"ranks": 4}, "ranks: expected a list such as [4,8], found 4"),
        (
            {"target_modules": "foo"},
            'target-modules: expected a list such as ["q_proj","v_proj"], or null, found \'foo\'',
        ),
        ({"options": 4}, 'options: expected a table such as {"residual_rank":8}, found 4'),
    ],
)
def test_a_mistake_in_code_is_said_as_on_the_command_line(given: dict[str, Any], told: str) -> None:
    makers: list[Callable[[], RunConfig]] = [
        lambda: RunConfig(**given),
        lambda: RunConfig.model_validate(given),
    ]
    for make in makers:
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == told
        assert caught.value.__cause__ is None


def test_a_strategy_of_ones_own_that_is_not_there_is_refused_in_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read strategy file"):
        RunConfig(strategy=f"{tmp_path}/gone.py:Mine")


def test_a_setting_without_a_value_leads_to_the_reference(tmp_path: Path) -> None:
    told = refused(tmp_path, settings=["help"])
    assert told == "--set 'help': expected key=value (corolla keys lists and explains all keys)"


WRONG: tuple[Any, ...] = (
    *(-1, 0, 2**64, 1.5, -0.5, math.nan, math.inf),
    "wrong",
    b"\xff",
    None,
    [],
    [[]],
    {},
    {1: 2},
)
"""Of every type, and outside of most bounds."""


@pytest.mark.parametrize("key", [*Settings.model_fields, *ClientClass.model_fields])
def test_every_wrong_value_is_answered_in_the_same_words(key: str) -> None:
    """Pydantic decides what is wrong; a list that is right for one key is not for another.

    The values are tried in one test: as tests of their own they would be one in eight of all.
    """
    of_run = key in Settings.model_fields
    path = re.escape(("" if of_run else "classes.phone.") + key.replace("_", "-"))
    for value in WRONG:
        given = {key: value} if of_run else {"classes": {"phone": {key: value}}}
        try:
            Settings.model_validate(given)
        except ValidationError:
            with pytest.raises(ConfigError) as caught:
                RunConfig.model_validate(given)
            said = str(caught.value)
            assert re.fullmatch(rf"{path}(\.\d)?: expected [^:]+(:.*)?, found .+", said), repr(
                value
            )


@pytest.mark.parametrize("key", Settings.model_fields)
def test_every_key_refuses_some_of_these_values(key: str) -> None:
    refused = 0
    for value in WRONG:
        try:
            Settings.model_validate({key: value})
        except ValidationError:
            refused += 1
    assert refused >= 6


def test_a_run_that_is_no_table_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^expected a table of keys, found 5$"):
        RunConfig.model_validate(5)


@pytest.mark.parametrize(
    "word", ["nonsenseword", "random", "weight", "table", "water", "momentum", "top_p", "thing"]
)
def test_a_word_that_is_like_no_key_is_not_answered_by_one(word: str) -> None:
    assert meant(word, RunConfig.model_fields) == ""


@pytest.mark.parametrize(
    ("word", "key"),
    [("rnak", "rank"), ("sed", "seed"), ("Roundz", "rounds"), ("batchsize", "batch_size")],
)
def test_a_misspelt_key_is_answered_by_it(word: str, key: str) -> None:
    assert meant(word, RunConfig.model_fields) == f"did you mean {key!r}?"
