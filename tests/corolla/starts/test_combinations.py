"""Every start with every strategy: the base model as it was, or one line that says why not."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.config.sections.starts import STARTS
from corolla.errors import ConfigError
from corolla.models.lora import LoraModel
from corolla.starts import table
from corolla.starts.table import Started
from corolla.strategies.listing.registry import STRATEGIES
from tests.corolla.starts.test_gradient import public
from tests.strategies import tiny

KEPT = [name for name in STARTS if name not in ("gradient", "loftq")]
"""Starts after which a model computes what the base computes."""


@cache
def model() -> LoraModel:
    return tiny.lora_model("llama")


@cache
def begun(start: str, train: str, folder: Path) -> Started:
    """What a start makes, whoever goes on from it."""
    name = "ffa_lora" if STARTS[start].frozen else "fedavg"
    given = {"train": train} if name == "ffa_lora" else {}
    config = settings(name, start, folder, given)
    return table.begin(model(), model().init(config.lora, 0), config)


def settings(name: str, start: str, folder: Path, options: dict[str, Any]) -> RunConfig:
    given: dict[str, Any] = {"start": start, "options": options, **tiny.classes(name)}
    if STARTS[start].rows:
        given["public"] = str(public("llama", folder))
    return tiny.config(name, **given)


def accepts(name: str, start: str, folder: Path, options: dict[str, Any]) -> bool:
    """Whether a strategy goes with a start; where it does, it begins at the base."""
    config = settings(name, start, folder, options)
    try:
        strategy = build_strategy(config)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert start in str(error)
        return False
    state = begun(start, str(options.get("train", "B")), folder).state(strategy, config.seed)
    model().show(strategy.adapter(state), config.lora)
    apart = tiny.logits(model().model) - tiny.logits(tiny.base("llama").model)
    assert float(apart.abs().max()) < 1e-5, (name, start)
    received = strategy.broadcast(state)
    assert not received.payload.keys() & received.cached.keys()
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("start", KEPT)
def test_a_start_goes_with_a_strategy_or_is_refused_in_one_line(start: str, folder: Path) -> None:
    tried: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in STRATEGIES]
    tried.append(("ffa_lora", {"train": "A"}))
    found = {
        (name, str(options.get("train", "B")))
        for name, options in tried
        if accepts(name, start, folder, options)
    }
    ours, usual = ("ffa_lora", "A"), ("ffa_lora", "B")
    if start == "random":
        assert len(found) == len(tried)
    elif start == "mica":
        assert found == {ours}
    elif start.startswith("channels"):
        assert found == {ours, usual}
    else:
        assert {("fedavg", "B"), ("fedex_lora", "B"), ("fed_sb", "B"), usual} <= found
        assert not {name for name, _ in found} & {"flora", "flexlora", "hetlora", "seed_pool"}
        assert (("feddpa", "B") in found) is not STARTS[start].offset
        assert (ours in found) is (start != "eva")


def test_what_is_random_depends_on_the_seed_and_the_module(folder: Path) -> None:
    for start in ("orthogonal", "channels"):
        made = begun(start, "B", folder).trained
        name = "ffa_lora" if STARTS[start].frozen else "fedavg"
        config = settings(name, start, folder, {}).model_copy(update={"seed": 1})
        other = table.begin(model(), model().init(config.lora, 0), config).trained
        factors = [n for n in made if n.endswith(".lora_A")]
        assert any(not torch.equal(made[n], other[n]) for n in factors)
        same = [n for n in factors if made[n].shape == made[factors[0]].shape]
        assert len(same) > 1
        assert not torch.equal(made[same[0]], made[same[1]])
